# GPT-2's smallest size, with nanoGPT's batch and schedule on OpenWebText: the same as train.py's defaults.
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

dataset = "openwebtext"
batch_size = 480  # 491,520 tokens
micro_batch_size = 12
max_steps = 600_000
warmup_steps = 2_000
learning_rate = 6e-4
min_learning_rate = 6e-5
weight_decay = 0.1
