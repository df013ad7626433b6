# The paper's 29M model; the recipe is that of the smallest.
from config.paper_16m import *

n_layer = 9
n_head = 4
n_embd = 320
