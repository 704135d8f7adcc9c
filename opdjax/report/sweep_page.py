"""stub"""
def sweep_page(points, name):
    raise NotImplementedError
