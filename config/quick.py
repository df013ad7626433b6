# The built-in demo: a 4M-class model on the Python standard library, minutes on two CPU cores.
dataset = "stdlib"
vocab_size = 4096
block_size = 256
n_layer = 4
n_head = 4
n_embd = 192

batch_size = 16
micro_batch_size = 16
max_steps = 600
warmup_steps = 50
learning_rate = 3e-3
min_learning_rate = 3e-4

eval_interval = 200
eval_sequences = 128
