"""Working together with other libraries; imported on demand, never by trim_plugin itself."""
