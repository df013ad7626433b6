# The paper's 221M model; the recipe is that of the smallest.
from config.paper_16m import *

n_layer = 21
n_head = 4
n_embd = 832
micro_batch_size = 8
