"""What a run knows of its neurons: questions to its tables, without torch.

card, claims, twoway       one neuron: triggers, distribution, value, and patterns tested both ways
find, striking, overview   which neurons to look at
"""
