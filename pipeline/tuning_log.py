"""stub"""
class TuningLog:
    def best(self, task, row): return None
