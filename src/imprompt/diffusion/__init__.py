"""How diffusion models are trained and sampled: objectives, guidance, samplers."""
