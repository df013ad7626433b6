# μ-centering (paper, §4), computed in the forward pass. Without another config file it trains train.py's defaults: GPT-2's
# smallest size on OpenWebText.
oec = "mu_centering"
