"""The links that optimizers are chained from: one algorithm per file, its formula beside its code."""
