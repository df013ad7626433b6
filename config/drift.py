# Logits that drift by themselves, on one CPU core (results/why.md): a high learning rate, and the last norm's gain kept at 1,
# so that the hidden states cannot shrink as the embeddings grow.
from config.sweep_cpu import *

final_norm_gain = False
max_steps = 16_000
warmup_steps = 800
learning_rate = 0.3
schedule = "wsd"

log_interval = 50
eval_interval = 500
eval_sequences = 256
