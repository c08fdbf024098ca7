"""A cluster under random load, transitions and deaths for as long as one likes: what wears out?"""
