"""Which blocks run on fewer tokens, and on how many: by what that does to the model's output on a few pictures.

Each block alone is run on fewer tokens, at a few shares, and the divergence of the output from the model's own is
measured (nats a picture; no labels). What several blocks lose adds up, to first order, as it does for ranks and units.
Shares between the measured ones lie on a straight line in the logarithms of what is merged and what is lost.
"""
