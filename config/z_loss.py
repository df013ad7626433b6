# z-loss (PaLM, arXiv 2204.02311): L ← L + λ mean((log Z)²). The paper compares with it.
z_loss_weight = 1e-4
