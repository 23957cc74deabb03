"""How good an engine is: scores, speed, the recipe's limits, and the record of them."""
