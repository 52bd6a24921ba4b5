"""What latents mean: summaries, reports and pictures."""
