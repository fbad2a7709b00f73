"""LayerBench: how well does a ranking of layers say what fine-tuning each of them alone will gain?

`protocol.py` has the question, the folds, the pairs and the contestants in words; everything else here runs it.
"""
