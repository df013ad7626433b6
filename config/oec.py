# μ-centering (paper, §4), computed in the forward pass. Alone it is the main job: a 124M-class model on OpenWebText,
# batch and schedule as GPT-2's, which are train.py's defaults. After a size file it is that size's method.
oec = "mu_centering"
