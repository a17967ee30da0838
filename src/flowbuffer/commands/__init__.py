"""What the commands of ``flowbuffer`` do: a file for each, without a word of output.

Each is a function that returns dataclasses; ``cli`` renders them, as text or as JSON.
"""
