//! The messages of the handover on the wire: encoded, and signed by their author for this session.

use crate::fault::Mechanism;
use crate::handover::{AbortReason, Message, Transfer};
use crate::identity::{NodeKey, PeerKey};
use crate::ids::SessionId;
use crate::message::Signed;
use crate::session::{Side, handover_message};

/// Why a signed message was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SignedError {
    /// Not signed by the peer, for this session, in its role.
    #[error("a message of the handover is not signed by the session's peer")]
    Signature,
    /// Well signed and not understood.
    #[error("a message of the handover cannot be decoded")]
    Form,
}

/// A message of the handover, encoded. Fields that a kind does not have are at their defaults.
#[derive(Clone, PartialEq, prost::Message)]
struct Wire {
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(uint64, tag = "2")]
    stream_len: u64,
    /// Root of a receipt, or digest of the receipt that a commit names.
    #[prost(bytes = "vec", tag = "3")]
    hash: Vec<u8>,
    #[prost(bool, tag = "4")]
    run: bool,
    #[prost(string, tag = "5")]
    reason: String,
}

/// Signs `message` as `side` of `session`.
pub fn sign(key: &NodeKey, side: Side, session: &SessionId, message: &Message) -> Signed {
    let wire = match message {
        Message::Receipt(Transfer { stream_len, root }) => {
            Wire { kind: 1, stream_len: *stream_len, hash: root.to_vec(), ..Wire::default() }
        }
        Message::Commit { receipt, run } => {
            Wire { kind: 2, hash: receipt.to_vec(), run: *run, ..Wire::default() }
        }
        Message::Abort(reason) => Wire { kind: 3, reason: reason.code().into(), ..Wire::default() },
        Message::NeverRan(reason) => Wire { kind: 4, reason: reason.code().into(), ..Wire::default() },
        Message::Running => Wire { kind: 5, ..Wire::default() },
        Message::Lost => Wire { kind: 6, ..Wire::default() },
        Message::Settled => Wire { kind: 7, ..Wire::default() },
    };
    let body = prost::Message::encode_to_vec(&wire);
    let signature = key.sign(&handover_message(side, session, &body)).to_vec();
    Signed { body, signature }
}

/// Verifies and decodes what `author` says as `side` of `session`.
pub fn open(
    author: &PeerKey,
    side: Side,
    session: &SessionId,
    signed: &Signed,
) -> Result<Message, SignedError> {
    let signature = signed.signature.as_slice().try_into().map_err(|_| SignedError::Signature)?;
    let said = author.verify(&handover_message(side, session, &signed.body), signature);
    if !said && !Mechanism::WordSignature.is_off() {
        return Err(SignedError::Signature);
    }
    let wire: Wire = prost::Message::decode(&signed.body[..]).map_err(|_| SignedError::Form)?;
    let hash = || <[u8; 32]>::try_from(&wire.hash[..]).map_err(|_| SignedError::Form);
    // A newer peer may have reasons that this build does not know.
    let reason = || AbortReason::from_code(&wire.reason).unwrap_or(AbortReason::PeerAborted);
    let message = match (wire.kind, side) {
        (1, Side::Destination) => Message::Receipt(Transfer { stream_len: wire.stream_len, root: hash()? }),
        (2, Side::Source) => Message::Commit { receipt: hash()?, run: wire.run },
        (3, Side::Source) => Message::Abort(reason()),
        (4, Side::Destination) => Message::NeverRan(reason()),
        (5, Side::Destination) => Message::Running,
        (6, Side::Destination) => Message::Lost,
        (7, Side::Source) => Message::Settled,
        _ => return Err(SignedError::Form),
    };
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::NodeName;

    const SESSION: SessionId = SessionId([3; 32]);

    fn key(n: u8) -> NodeKey {
        NodeKey::from_seed(NodeName::new(format!("n{n}")).unwrap(), &[n; 32])
    }

    #[test]
    fn every_message_survives_and_only_from_its_author() {
        let transfer = Transfer { stream_len: 77, root: [1; 32] };
        let messages = [
            (Side::Destination, Message::Receipt(transfer)),
            (Side::Source, Message::Commit { receipt: transfer.digest(), run: true }),
            (Side::Source, Message::Abort(AbortReason::Cancelled)),
            (Side::Destination, Message::NeverRan(AbortReason::VmmGoneDestination)),
            (Side::Destination, Message::Running),
            (Side::Destination, Message::Lost),
            (Side::Source, Message::Settled),
        ];
        for (side, message) in messages {
            let other = if side == Side::Source { Side::Destination } else { Side::Source };
            let signed = sign(&key(1), side, &SESSION, &message);
            assert_eq!(open(&key(1).public(), side, &SESSION, &signed), Ok(message));
            let refused = Err(SignedError::Signature);
            assert_eq!(open(&key(2).public(), side, &SESSION, &signed), refused, "forged_receipt");
            assert_eq!(open(&key(1).public(), other, &SESSION, &signed), refused, "reflect");
            assert_eq!(open(&key(1).public(), side, &SessionId([4; 32]), &signed), refused, "replay_session");
            // A role cannot say what belongs to the other one, however well it signs.
            let stolen = sign(&key(1), other, &SESSION, &message);
            assert_eq!(open(&key(1).public(), other, &SESSION, &stolen), Err(SignedError::Form));
        }
    }
}
