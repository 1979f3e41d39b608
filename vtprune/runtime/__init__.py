"""The runtime: everything that registers hooks or touches a cache. `Pruner` is the handle behind `model.vtprune`."""
