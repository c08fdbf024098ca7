"""KunServe on SGLang: parameter-centric memory management for bursts (EuroSys'26)."""

__version__ = "0.1.0"
