"""Whether this process compiles its passes over tensors: `device.set_up` decides, once."""

enabled = False
