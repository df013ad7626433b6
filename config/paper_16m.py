# The paper's smallest model and its whole recipe (paper, §5): 13.1 B tokens of FineWeb.
n_layer = 6
n_head = 4
n_embd = 224
block_size = 2048

dataset = "fineweb"
batch_size = 64  # 131,072 tokens
micro_batch_size = 16
max_steps = 100_000
warmup_steps = 5_000
learning_rate = 3e-3  # the paper tries 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1 and 3e-1
min_learning_rate = 1e-5
weight_decay = 0.0
