# Nothing against the drift of the logits: what the others are compared with.
oec = "none"
z_loss_weight = 0.0
logit_softcap = 0.0
