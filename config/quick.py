# The built-in demo: a small model on the Python standard library, minutes on two CPU cores.
dataset = "stdlib"
vocab_size = 4096
block_size = 256
n_layer = 2
n_head = 2
n_embd = 64

batch_size = 8
micro_batch_size = 8
max_steps = 1_250
warmup_steps = 50
learning_rate = 2e-2
min_learning_rate = 1e-3

log_interval = 20
eval_interval = 250
eval_sequences = 128
