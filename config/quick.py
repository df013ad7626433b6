# The built-in demo: a small model on the Python standard library, under three minutes on two CPU cores. In that time one
# layer with a short context sees more tokens than two layers, and reaches a lower loss.
dataset = "stdlib"
vocab_size = 4096
block_size = 64
n_layer = 1
n_head = 4
n_embd = 64

batch_size = 32
micro_batch_size = 32
max_steps = 960
warmup_steps = 50
learning_rate = 2e-2
min_learning_rate = 1e-3
beta1 = 0.8
beta2 = 0.99

log_interval = 20
eval_interval = 0
eval_sequences = 1_024
