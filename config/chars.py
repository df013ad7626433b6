# A model of characters on one small file of yours, in about two minutes on two CPU cores. Prepare the file first, with its
# bytes as tokens:
#     python data/text/prepare.py input.txt --tokenizer bytes --out data/chars
dataset = "chars"
vocab_size = 257
block_size = 128
n_layer = 2
n_head = 4
n_embd = 128

batch_size = 16
micro_batch_size = 16
max_steps = 800
warmup_steps = 50
learning_rate = 3e-3
min_learning_rate = 3e-4
beta2 = 0.99

log_interval = 50
eval_interval = 200
eval_sequences = 256
