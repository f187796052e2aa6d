//! Spans for an OpenTelemetry collector, by OTLP over HTTP, in builds with the feature `otlp`.
//!
//! The usual variables say where: `OTEL_EXPORTER_OTLP_ENDPOINT` (such as `http://collector:4318`), `OTEL_SERVICE_NAME` and the others.

/// Either of them asks for an export.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];

fn is_asked_for() -> bool {
    ENDPOINTS.iter().any(|variable| std::env::var_os(variable).is_some_and(|value| !value.is_empty()))
}

#[cfg(feature = "otlp")]
mod export {
    use std::sync::OnceLock;

    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::Layer;

    use super::super::logs::Above;

    /// Kept to send what is left at the end.
    static PROVIDER: OnceLock<SdkTracerProvider> = OnceLock::new();

    /// A layer that exports spans, if the environment asks for it.
    pub fn layer(program: &'static str) -> Result<Option<Above>, String> {
        if !super::is_asked_for() {
            return Ok(None);
        }
        let exporter = opentelemetry_otlp::SpanExporter::builder().with_http().build();
        let exporter = exporter.map_err(|error| format!("spans cannot be exported: {error}"))?;
        let resource = Resource::builder().with_service_name(service(program)).build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("peapod")).with_filter(only_traces());
        let _ = PROVIDER.set(provider);
        Ok(Some(layer.boxed()))
    }

    /// What libraries do inside is their own.
    fn only_traces() -> tracing_subscriber::filter::Targets {
        tracing_subscriber::filter::Targets::new().with_target(crate::trace::TARGET, tracing::Level::DEBUG)
    }

    fn service(program: &str) -> String {
        std::env::var("OTEL_SERVICE_NAME").unwrap_or_else(|_| format!("peapod-{program}"))
    }

    /// Sends what has not been sent yet, for a few seconds at most.
    pub fn finish() {
        if let Some(provider) = PROVIDER.get() {
            // A collector that is away is no failure of the job.
            let _ = provider.shutdown();
        }
    }
}

#[cfg(not(feature = "otlp"))]
mod export {
    use super::super::logs::Above;

    /// No layer, and a word to whoever asks for one.
    pub fn layer(_program: &'static str) -> Result<Option<Above>, String> {
        if super::is_asked_for() {
            super::super::say(format_args!(
                "{} is set, but this program was built without the feature `otlp`: no spans are exported",
                super::ENDPOINTS[0]
            ));
        }
        Ok(None)
    }

    /// Nothing to send.
    pub fn finish() {}
}

pub use export::finish;
pub(super) use export::layer;
