# Logit soft-capping (Gemma 2, arXiv 2408.00118): l ← c·tanh(l / c). The paper compares with it.
logit_softcap = 30.0
