"""How often a model answers right from fewer tokens: arms, answers that survive an interruption, tables and a plot."""
