"""How a Python becomes an agent. Apart from cluster/nodescript.py, for those that become one and must be quick."""

# -P: a folder `dtrain` in the working directory must not shadow the installed package.
AGENT = ("-P", "-m", "dtrain.runtime.agent")
