"""Training by recipe: `job.run` reads the recipe, `loop` trains, a strategy spreads it over ranks.

What the parts are for each other:

- A model is a `chain.Chain`: blocks one after the other, each giving what the next one takes (a tensor, or a
  tuple that becomes its arguments). A model takes one tensor and gives one tensor of logits or values.
- The data is `rows.Rows`: `len(rows)` and `rows.batch(indices) -> (inputs, targets)` on the rank's device.
- The loss is an `objective.Objective`: a sum over rows (or tokens) and the sum of their weights, so that any
  cut into micro-batches or ranks gives the same gradient: sum of losses over all / sum of weights over all.
- A strategy (`strategies.base`) takes one step on a global batch, which every rank knows by its indices.
"""
