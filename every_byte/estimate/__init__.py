from every_byte.estimate.setup import *  # noqa: F403
