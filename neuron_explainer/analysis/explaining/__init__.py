"""Explaining units in words or by rules, and measuring what an explanation is worth."""
