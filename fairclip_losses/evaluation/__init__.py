"""Group fairness of predictions: `group_metrics`, and the `report` of them with intervals.

`fairclip_losses.metrics` is the public face of both; `zero_shot` makes the predictions.
"""
