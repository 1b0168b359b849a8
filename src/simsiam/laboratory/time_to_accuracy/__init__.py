"""Minutes to levels of kNN accuracy: this program, a plain loop and features in closed form.

`simsiam bench --only time_to_accuracy`. Start reading with `race`; `plain_loop` is the loop that is
compared.
"""
