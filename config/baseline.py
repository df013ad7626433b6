# No remedy against the drift of the logits. The other methods are compared with this one.
oec = "none"
z_loss_weight = 0.0
logit_softcap = 0.0
