"""From symbolic circuits to tensors: compiling, layers, semirings, and the passes that every query is made of."""
