# Logit soft-capping (Gemma 2, arXiv 2408.00118): l ← c·tanh(l / c). A baseline of the paper.
logit_softcap = 30.0
