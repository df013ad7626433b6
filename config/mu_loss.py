# μ-loss (paper, §4): L ← L + λ μᵀμ.
oec = "mu_loss"
mu_loss_weight = 1e-4
