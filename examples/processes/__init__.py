"""Data-parallel training over several processes that survives the death of one: see `__main__`.

`launcher` starts, joins and ends processes and knows nothing of norms. `training` is what each process does; the data
and the network are those of `jaxnorm.demo`.
"""
