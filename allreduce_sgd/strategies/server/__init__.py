"""Parameter servers: ranks that hold the parameters and do nothing else, and workers that only compute gradients.

Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014. The last ranks of the job are
servers (`roles.py`), each with a part of every parameter vector (`shards.py`) and a loop that answers requests
(`loop.py`); what it does with gradients says a rule (`rules.py`). Workers speak to servers only by messages between
two ranks (`messages.py`, `line.py`), never by an all-reduce of gradients or parameters.
"""
