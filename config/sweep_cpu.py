# The model of our own sweep (results/why.md): a run takes about 90 s on one CPU core.
dataset = "stdlib"
vocab_size = 4096
block_size = 64
n_layer = 2
n_head = 2
n_embd = 64

batch_size = 16
micro_batch_size = 16
max_steps = 500
warmup_steps = 25
min_learning_rate = 1e-5
weight_decay = 0.0
dtype = "bfloat16"

log_interval = 20
eval_interval = 0
eval_sequences = 512
