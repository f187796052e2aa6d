//! One piece of work that two programs see: which one it is travels in the metadata of a call, as W3C Trace Context has it.
//!
//! A worker's session with the coordinator is one trace: its joining, its requests for leases, its checkpoints and pictures. Log lines of
//! both programs carry its id (`trace_id`); a collector, where there is one, gets the spans.

use tonic::Request;
use tonic::metadata::MetadataMap;
use tracing::Span;

/// Target of all spans made here: shown where somebody can make use of them.
pub const TARGET: &str = "trace";

/// Key of the metadata.
const TRACEPARENT: &str = "traceparent";

/// A span for [`Trace`](crate::trace::Trace), with a field for its id; after `parent:`, one below another.
#[macro_export]
macro_rules! work_span {
    (parent: $parent:expr, $($name_and_fields:tt)+) => {
        $crate::tracing::debug_span!(
            target: $crate::trace::TARGET, parent: $parent, $($name_and_fields)+, trace_id = $crate::tracing::field::Empty
        )
    };
    ($($name_and_fields:tt)+) => {
        $crate::tracing::debug_span!(target: $crate::trace::TARGET, $($name_and_fields)+, trace_id = $crate::tracing::field::Empty)
    };
}

/// A span, and where it stands in a trace.
#[derive(Debug, Clone)]
pub struct Trace {
    span: Span,
    place: Place,
}

/// What the metadata says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    trace_id: [u8; 16],
    span_id: [u8; 8],
}

impl Place {
    /// A place of its own, or in the trace of another.
    fn new(trace_id: Option<[u8; 16]>) -> Self {
        let mut bytes = [0; 24];
        // Without randomness traces cannot be told apart; nothing else depends on them.
        let _ = getrandom::fill(&mut bytes);
        // All zeros would be no id.
        bytes[0] |= 1;
        bytes[16] |= 1;
        let (mut own_trace, mut span_id) = ([0; 16], [0; 8]);
        own_trace.copy_from_slice(&bytes[..16]);
        span_id.copy_from_slice(&bytes[16..]);
        Self { trace_id: trace_id.unwrap_or(own_trace), span_id }
    }

    /// As version 00 of the header, sampled.
    fn header(&self) -> String {
        format!("00-{}-{}-01", hex::encode(self.trace_id), hex::encode(self.span_id))
    }

    /// Reads any version's first four fields; nothing that is not well formed.
    fn parse(header: &str) -> Option<Self> {
        let mut fields = header.split('-');
        let (version, trace_id, span_id, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let [version] = bytes::<1>(version)?;
        let _flags: [u8; 1] = bytes(flags)?;
        let is_known = version != 0xff && (version != 0 || fields.next().is_none());
        let (trace_id, span_id) = (bytes(trace_id)?, bytes(span_id)?);
        (is_known && trace_id != [0; 16] && span_id != [0; 8]).then_some(Self { trace_id, span_id })
    }
}

impl Trace {
    /// A trace that begins with a [`work_span!`](crate::work_span).
    #[must_use]
    pub fn begin(span: Span) -> Self {
        Self::at(span, None)
    }

    /// A [`work_span!`](crate::work_span) in the same trace.
    #[must_use]
    pub fn child(&self, span: Span) -> Self {
        Self::at(span, Some(self.place))
    }

    /// A [`work_span!`](crate::work_span) in the trace that the metadata of a call names, or in one of its own.
    #[must_use]
    pub fn follow(span: Span, metadata: &MetadataMap) -> Self {
        let caller = metadata.get(TRACEPARENT).and_then(|header| Place::parse(header.to_str().ok()?));
        Self::at(span, caller)
    }

    fn at(span: Span, parent: Option<Place>) -> Self {
        let place = exported::place(&span, parent).unwrap_or_else(|| Place::new(parent.map(|parent| parent.trace_id)));
        span.record("trace_id", hex::encode(place.trace_id));
        Self { span, place }
    }

    /// The span.
    #[must_use]
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// A request that carries this.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Ok(header) = self.place.header().parse() {
            request.metadata_mut().insert(TRACEPARENT, header);
        }
        request
    }
}

#[cfg(feature = "otlp")]
mod exported {
    use opentelemetry::trace::{SpanContext, TraceContextExt, TraceFlags, TraceState};
    use opentelemetry::{Context, SpanId, TraceId};
    use tracing::Span;
    use tracing_opentelemetry::OpenTelemetrySpanExt;

    use super::Place;

    /// Where an exported span stands, once it has been put below its parent; nothing if it is not exported.
    pub fn place(span: &Span, parent: Option<Place>) -> Option<Place> {
        if let Some(Place { trace_id, span_id }) = parent {
            let (trace_id, span_id) = (TraceId::from_bytes(trace_id), SpanId::from_bytes(span_id));
            let parent = SpanContext::new(trace_id, span_id, TraceFlags::SAMPLED, true, TraceState::default());
            // Nothing exports it: there is no place either.
            span.set_parent(Context::new().with_remote_span_context(parent)).ok()?;
        }
        let context = span.context();
        let own = context.span().span_context().clone();
        own.is_valid().then(|| Place { trace_id: own.trace_id().to_bytes(), span_id: own.span_id().to_bytes() })
    }
}

#[cfg(not(feature = "otlp"))]
mod exported {
    use tracing::Span;

    use super::Place;

    /// Nothing is exported.
    pub fn place(_span: &Span, _parent: Option<Place>) -> Option<Place> {
        None
    }
}

/// Bytes from lower-case hexadecimal digits, exactly so many.
fn bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let is_lower = !text.bytes().any(|digit| digit.is_ascii_uppercase());
    (is_lower && hex::decode_to_slice(text, &mut bytes).is_ok()).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_continues_the_trace_of_its_caller() {
        let session = Trace::begin(crate::work_span!("session"));
        let upload = session.child(crate::work_span!("upload", step = 3));
        let request = upload.request(());
        let received = Trace::follow(crate::work_span!("upload"), request.metadata());
        let ids = [&session, &upload, &received].map(|trace| trace.place.trace_id);
        assert!(ids[0] == ids[1] && ids[1] == ids[2] && ids[0] != [0; 16]);
        let spans = [&session, &upload, &received].map(|trace| trace.place.span_id);
        assert!(spans[0] != spans[1] && spans[1] != spans[2]);
        assert_ne!(Trace::begin(crate::work_span!("session")).place.trace_id, ids[0]);
    }

    #[test]
    fn header_is_read_as_the_recommendation_has_it_and_nothing_else_is() {
        let example = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let place = Place::parse(example).unwrap();
        assert_eq!((place.header().as_str(), place.span_id[1]), (example, 0xf0));
        assert_eq!(Place::parse("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-more"), Some(place), "a later version");
        for broken in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e47é-00f067aa0ba902b7-01",
        ] {
            assert_eq!(Place::parse(broken), None, "{broken}");
        }
    }
}
