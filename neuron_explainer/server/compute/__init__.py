"""What runs beside the model: each panel of the viewer is a function from plain values to plain values.

Nothing here knows HTTP. Requests come from :mod:`neuron_explainer.server.worker`, and their form has been
checked by :mod:`neuron_explainer.server.computing`.
"""
