//! How a [`Failure`] travels in a failed call: as the one detail of a `google.rpc.Status` in the trailer
//! `grpc-status-details-bin`, where generic clients look for it as well.

use prost::Message;
use tonic::{Code, Status};

use crate::v1::{Blame, Failure};

const TYPE_URL: &str = "type.googleapis.com/dwcp.agent.v1.Failure";

/// Code of a failure: this version of the agent cannot do what was asked.
pub const UNSUPPORTED: &str = "unsupported";
/// Code of a failure: there is no migration of this id.
pub const UNKNOWN_MIGRATION: &str = "unknown_migration";
/// Code of a failure: the request is not well formed.
pub const BAD_REQUEST: &str = "bad_request";

/// `google.rpc.Status`, the envelope that gRPC's rich errors agree on.
#[derive(Clone, PartialEq, Message)]
struct Envelope {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

/// Puts a failure into the status of a failed call.
pub fn to_status(failure: &Failure) -> Status {
    let code = code(failure);
    let message = format!("{}: {}", failure.code, failure.message);
    let detail = prost_types::Any { type_url: TYPE_URL.to_owned(), value: failure.encode_to_vec() };
    let envelope = Envelope { code: code as i32, message: message.clone(), details: vec![detail] };
    Status::with_details(code, message, envelope.encode_to_vec().into())
}

/// Takes the failure out of the status of a failed call; `None` where the call failed before the agent could answer.
pub fn from_status(status: &Status) -> Option<Failure> {
    let envelope = Envelope::decode(status.details()).ok()?;
    let detail = envelope.details.iter().find(|detail| detail.type_url == TYPE_URL)?;
    Failure::decode(&*detail.value).ok()
}

fn code(failure: &Failure) -> Code {
    match (failure.code.as_str(), failure.blame()) {
        (UNSUPPORTED, _) => Code::Unimplemented,
        (UNKNOWN_MIGRATION, _) => Code::NotFound,
        (BAD_REQUEST, _) => Code::InvalidArgument,
        (_, Blame::Operator | Blame::Vmm | Blame::PeerIncompatible) => Code::FailedPrecondition,
        (_, Blame::PeerMisbehaving) => Code::Aborted,
        (_, Blame::Link) => Code::Unavailable,
        (_, Blame::Local) => Code::Internal,
        (_, Blame::Unspecified) => Code::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_survives_the_trailer() {
        let failure = Failure {
            code: "unreachable".to_owned(),
            blame: Blame::Link as i32,
            message: "no answer from 192.0.2.1:7000".to_owned(),
            hint: "check the firewall".to_owned(),
        };
        let status = to_status(&failure);
        assert_eq!(status.code(), Code::Unavailable);
        let mut headers = tonic::codegen::http::HeaderMap::new();
        status.add_header(&mut headers).unwrap();
        let received = Status::from_header_map(&headers).unwrap();
        assert_eq!(from_status(&received), Some(failure));
    }

    #[test]
    fn a_foreign_status_holds_none() {
        assert_eq!(from_status(&Status::unavailable("connection refused")), None);
        assert_eq!(from_status(&Status::with_details(Code::Internal, "", vec![0xff; 9].into())), None);
    }
}
