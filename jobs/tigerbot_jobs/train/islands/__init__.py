"""Islands: groups of workers that synchronise every step inside, and with each other every H steps (DiLoCo).

Every island is a training run of its own, with its own process group, checkpoints and recovery; islands meet only at
an outer server. `rounds` decides, `server` and `client` carry, `sync` is what a training loop calls.
"""
