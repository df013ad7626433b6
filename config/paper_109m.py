# The paper's 109M model; the recipe is that of the smallest.
from config.paper_16m import *

n_layer = 15
n_head = 4
n_embd = 640
micro_batch_size = 8
