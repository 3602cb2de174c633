//! Opening a session and joining connections to it: the messages of `dwcp_proto::message`'s sequence, up to `Joined`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dwcp_link::{Connection, DialOptions, Gauge, Identity, Kind, Reader, Writer, dial, dial_plain};
use dwcp_proto::fault::Mechanism;
use dwcp_proto::message::{
    Ask, Body, Challenge, Choice, Confirm, Confirmed, Hello, Join, Joined, Offer, Purpose, Told, Welcome,
};
use dwcp_proto::negotiate::permits;
use dwcp_proto::session::{Transcript, confirm_message, join_message, joined_message};
use dwcp_proto::{Leg, MigrationId, Mode, NodeKey, NodeName, Path, PeerKey, SessionId, Side};
use prost::Message as _;

use crate::config::Congestion;
use crate::error::{Blame, Failure};
use crate::transport::Quic;
use crate::wire::{
    CHOOSING, WireError, link_failure, read_message, read_message_within, refusal, write_message,
    write_preamble,
};

/// A session, as either end knows it.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) side: Side,
    /// Our key.
    pub(crate) key: Arc<NodeKey>,
    /// The peer's.
    pub(crate) peer: PeerKey,
    /// The leg that it begins with.
    pub(crate) leg: Leg,
    /// What both sides offered.
    pub(crate) offers: Offers,
}

/// What both sides can do, as they said before the session.
#[derive(Debug, Clone, Default)]
pub(crate) struct Offers {
    pub(crate) source: Offer,
    pub(crate) destination: Offer,
}

impl Session {
    fn new(
        id: SessionId,
        side: Side,
        key: Arc<NodeKey>,
        peer: PeerKey,
        choice: Choice,
        offers: Offers,
    ) -> Result<Self, WireError> {
        let leg = Leg::first(id, choice).ok_or(WireError::Message)?;
        Ok(Session { id, side, key, peer, leg, offers })
    }
}

/// Random bytes of the system's generator.
pub(crate) fn nonce() -> Result<[u8; 32], Failure> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|error| {
        Failure::new("no_randomness", Blame::Local, format!("the system gives no random bytes: {error}"), "")
    })?;
    Ok(bytes)
}

fn bytes32(bytes: &[u8]) -> Result<[u8; 32], WireError> {
    bytes.try_into().map_err(|_| WireError::Message)
}

fn signature(bytes: &[u8]) -> Result<[u8; 64], WireError> {
    bytes.try_into().map_err(|_| WireError::Message)
}

fn forged(what: &str) -> Failure {
    Failure::new(
        "signature",
        Blame::PeerMisbehaving,
        format!("the signature of the peer's {what} is wrong"),
        "something between the agents alters messages, or the peer is not what it seems",
    )
}

/// How the source reaches the destination.
#[derive(Debug, Clone)]
pub(crate) struct Dialler {
    pub(crate) addr: SocketAddr,
    pub(crate) identity: Identity,
    pub(crate) key: Arc<NodeKey>,
    pub(crate) to: NodeName,
    pub(crate) options: DialOptions,
    /// For data connections over links that are no datacenter's.
    pub(crate) congestion: Congestion,
    /// Whether QUIC gets through, where it was chosen.
    pub(crate) quic: Arc<Quic>,
}

/// The source's side after `Welcome`: all is known that the choice depends on.
pub(crate) struct Met {
    reader: Reader,
    writer: Writer,
    exporter: [u8; 32],
    peer: PeerKey,
    hello: Vec<u8>,
    welcome_bytes: Vec<u8>,
    /// What the destination said.
    pub(crate) welcome: Welcome,
    /// From `Hello` to `Welcome`; the destination asks its VMM in between, so the TCP estimate is better where there is one.
    pub(crate) rtt: Duration,
}

impl Dialler {
    /// Makes the control connection and exchanges `Hello` and `Welcome`.
    pub(crate) async fn meet(&self, hello: Hello) -> Result<Met, Failure> {
        let conn = dial(self.addr, &self.identity, &self.to, &self.options).await.map_err(link_failure)?;
        let (Some(peer), Some(exporter)) = (conn.peer().cloned(), conn.exporter()) else {
            return Err(forged("connection"));
        };
        let gauge = conn.gauge();
        let (mut reader, mut writer) = conn.into_split();
        let sent = Instant::now();
        let wrote = write_message(&mut writer, Body::Hello(hello)).await;
        // A refusal shows at the first read, and says more than the write's reset.
        let answer = read_message(&mut reader).await;
        let (hello, (body, welcome_bytes)) = match (wrote, answer) {
            (Ok(hello), Ok(answer)) => (hello, answer),
            (_, Err(error)) | (Err(error), _) => return Err(error.failure()),
        };
        let rtt = gauge.sample().map_or_else(|| sent.elapsed(), |s| s.min_rtt.min(s.rtt));
        let Body::Welcome(welcome) = body else {
            return Err(WireError::Unexpected { got: body.kind(), expected: "welcome" }.failure());
        };
        Ok(Met { reader, writer, exporter, peer, hello, welcome_bytes, welcome, rtt })
    }

    /// How data connections are made over a link of this kind.
    pub(crate) fn for_data(&self, link: Mode) -> DialOptions {
        let mut options = self.options.clone();
        if link == Mode::Internet {
            options.tuning.congestion = self.congestion.name();
        }
        options
    }

    /// Asks for the other side's story of a migration.
    pub(crate) async fn ask(&self, id: &MigrationId) -> Result<Vec<u8>, Failure> {
        let conn = dial(self.addr, &self.identity, &self.to, &self.options).await.map_err(link_failure)?;
        let (mut reader, mut writer) = conn.into_split();
        let ask = Body::Ask(Ask { migration: id.to_string() });
        let wrote = write_message(&mut writer, ask).await;
        match (wrote, read_message(&mut reader).await) {
            (_, Ok((Body::Told(Told { story }), _))) => Ok(story),
            (_, Ok((body, _))) => Err(WireError::Unexpected { got: body.kind(), expected: "told" }.failure()),
            (_, Err(error)) => Err(error.failure()),
        }
    }

    /// Joins a further connection to `session`, for `leg` where it is to carry data.
    pub(crate) async fn join(
        &self,
        session: &Session,
        leg: &Leg,
        purpose: Purpose,
        link: u32,
    ) -> Result<(Reader, Writer, Joined, Gauge), WireError> {
        let plain = leg.choice.plain && purpose != Purpose::Control;
        let number = if purpose == Purpose::Control { 0 } else { leg.number };
        let options = match purpose {
            Purpose::Control => self.options.clone(),
            Purpose::Chunks | Purpose::Bytes => self.for_data(leg.mode),
        };
        let quic = leg.choice.quic && purpose == Purpose::Chunks;
        let conn = match (plain, quic) {
            (true, _) => dial_plain(self.addr, &options).await,
            (false, true) => self.dial_quic_or_tcp(&options).await,
            (false, false) => dial(self.addr, &self.identity, &self.to, &options).await,
        }
        .map_err(WireError::Link)?;
        let (exporter, gauge) = (conn.exporter(), conn.gauge());
        let (mut reader, mut writer) = conn.into_split();
        let binding = match exporter {
            Some(exporter) => exporter,
            None => {
                write_preamble(&mut writer).await?;
                let (body, _) = read_message(&mut reader).await?;
                let Body::Challenge(Challenge { nonce }) = body else {
                    return Err(WireError::Unexpected { got: body.kind(), expected: "challenge" });
                };
                bytes32(&nonce)?
            }
        };
        let signed = self.key.sign(&join_message(&session.id, purpose, number, link, &binding));
        let join = Join {
            session: session.id.0.to_vec(),
            purpose: purpose as i32,
            link,
            signature: signed.to_vec(),
            leg: number,
        };
        write_message(&mut writer, Body::Join(join)).await?;
        let (body, _) = read_message(&mut reader).await?;
        let Body::Joined(joined) = body else {
            return Err(WireError::Unexpected { got: body.kind(), expected: "joined" });
        };
        let message = joined_message(&session.id, joined.next, joined.applied, &binding);
        if !session.peer.verify(&message, &signature(&joined.signature)?) {
            return Err(WireError::Refused(forged("joined")));
        }
        Ok((reader, writer, joined, gauge))
    }
}

impl Met {
    /// Fixes the choice; from here on both sides hold the session's id.
    pub(crate) async fn confirm(
        mut self,
        key: Arc<NodeKey>,
        choice: Choice,
        offer: Offer,
    ) -> Result<(Session, Reader, Writer), Failure> {
        let id = Transcript {
            exporter: &self.exporter,
            source: key.public().as_bytes(),
            destination: self.peer.as_bytes(),
            hello: &self.hello,
            welcome: &self.welcome_bytes,
            choice: &choice.encode_to_vec(),
        }
        .id();
        let signed = key.sign(&confirm_message(Side::Source, &id)).to_vec();
        let confirm = Confirm { choice: Some(choice.clone()), signature: signed };
        write_message(&mut self.writer, Body::Confirm(confirm)).await.map_err(WireError::failure)?;
        let (body, _) = read_message(&mut self.reader).await.map_err(WireError::failure)?;
        let Body::Confirmed(Confirmed { signature: theirs }) = body else {
            return Err(WireError::Unexpected { got: body.kind(), expected: "confirmed" }.failure());
        };
        let theirs = signature(&theirs).map_err(WireError::failure)?;
        if !self.peer.verify(&confirm_message(Side::Destination, &id), &theirs) {
            return Err(forged("confirmed"));
        }
        let offers = Offers { source: offer, destination: self.welcome.offer.unwrap_or_default() };
        let session =
            Session::new(id, Side::Source, key, self.peer, choice, offers).map_err(WireError::failure)?;
        Ok((session, self.reader, self.writer))
    }
}

/// The destination's side after `Hello`.
pub(crate) struct Greeted {
    pub(crate) hello: Hello,
    pub(crate) peer: PeerKey,
    /// Where the source's agent can be asked, if it says so.
    pub(crate) peer_addr: Option<SocketAddr>,
    hello_bytes: Vec<u8>,
    exporter: [u8; 32],
    reader: Reader,
    writer: Writer,
}

/// A peer that asks what is known of a migration.
pub(crate) struct Asking {
    pub(crate) ask: Ask,
    pub(crate) peer: PeerKey,
    writer: Writer,
}

impl Asking {
    /// Answers.
    pub(crate) async fn tell(mut self, told: Told) {
        let _ = write_message(&mut self.writer, Body::Told(told)).await;
    }

    /// Refuses.
    pub(crate) async fn refuse(mut self, failure: &Failure) {
        let _ = write_message(&mut self.writer, refusal(failure)).await;
    }
}

/// A peer that measures the link; its burst follows.
pub(crate) struct Probing {
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
}

impl Probing {
    /// Refuses.
    pub(crate) async fn refuse(mut self, failure: &Failure) {
        let _ = write_message(&mut self.writer, refusal(failure)).await;
    }
}

/// A connection that wants to join a session; its signature is not yet checked.
pub(crate) struct Joining {
    pub(crate) join: Join,
    binding: [u8; 32],
    /// The peer by TLS or QUIC; `None` on a plain connection.
    peer: Option<PeerKey>,
    quic: bool,
    reader: Reader,
    writer: Writer,
}

/// What a new connection turned out to be.
pub(crate) enum Newcomer {
    Greeted(Box<Greeted>),
    Joining(Box<Joining>),
    Asking(Box<Asking>),
    Probing(Box<Probing>),
}

/// Reads what a new connection wants.
pub(crate) async fn receive(conn: Connection) -> Result<Newcomer, Failure> {
    let (peer, exporter, addr) = (conn.peer().cloned(), conn.exporter(), conn.peer_addr());
    let quic = conn.kind() == Kind::Quic;
    let (mut reader, mut writer) = conn.into_split();
    let binding = match exporter {
        Some(exporter) => exporter,
        None => {
            let nonce = nonce()?;
            let preamble = crate::wire::read_preamble(&mut reader);
            tokio::time::timeout(crate::wire::PATIENCE, preamble)
                .await
                .unwrap_or(Err(WireError::Timeout(crate::wire::PATIENCE)))
                .map_err(WireError::failure)?;
            let challenge = Challenge { nonce: nonce.to_vec() };
            write_message(&mut writer, Body::Challenge(challenge)).await.map_err(WireError::failure)?;
            nonce
        }
    };
    let (body, bytes) = read_message(&mut reader).await.map_err(WireError::failure)?;
    match (body, peer) {
        (Body::Hello(hello), Some(peer)) => Ok(Newcomer::Greeted(Box::new(Greeted {
            peer_addr: listens_at(addr, hello.listens),
            hello,
            peer,
            hello_bytes: bytes,
            exporter: binding,
            reader,
            writer,
        }))),
        (Body::Ask(ask), Some(peer)) => Ok(Newcomer::Asking(Box::new(Asking { ask, peer, writer }))),
        (Body::Probe(_), Some(_)) => Ok(Newcomer::Probing(Box::new(Probing { reader, writer }))),
        (Body::Join(join), peer) => {
            Ok(Newcomer::Joining(Box::new(Joining { join, binding, peer, quic, reader, writer })))
        }
        (body, _) => {
            Err(WireError::Unexpected { got: body.kind(), expected: "hello, join, ask or probe" }.failure())
        }
    }
}

/// A peer that came from `addr` listens at that address, on the port that it says.
fn listens_at(addr: Option<SocketAddr>, port: u32) -> Option<SocketAddr> {
    let port = u16::try_from(port).ok().filter(|port| *port != 0)?;
    Some(SocketAddr::new(addr?.ip(), port))
}

impl Greeted {
    /// Refuses.
    pub(crate) async fn refuse(mut self, failure: &Failure) {
        let _ = write_message(&mut self.writer, refusal(failure)).await;
    }

    /// Answers with our offer. `Ok(None)` if the source only asked. `register` is called before the source knows that
    /// the session stands, so that no join of it can come too early.
    pub(crate) async fn welcome(
        mut self,
        key: Arc<NodeKey>,
        offer: Offer,
        description: Vec<u8>,
        register: impl FnOnce(&Session),
    ) -> Result<Option<(Session, Reader, Writer)>, Failure> {
        let welcome = Welcome { nonce: nonce()?.to_vec(), offer: Some(offer.clone()), description };
        let welcome_bytes =
            write_message(&mut self.writer, Body::Welcome(welcome)).await.map_err(WireError::failure)?;
        if self.hello.check {
            return Ok(None);
        }
        let read = read_message_within(CHOOSING, &mut self.reader).await;
        let (body, _) = read.map_err(WireError::failure)?;
        let Body::Confirm(Confirm { choice: Some(choice), signature: theirs }) = body else {
            return Err(WireError::Unexpected { got: body.kind(), expected: "confirm" }.failure());
        };
        let id = Transcript {
            exporter: &self.exporter,
            source: self.peer.as_bytes(),
            destination: key.public().as_bytes(),
            hello: &self.hello_bytes,
            welcome: &welcome_bytes,
            choice: &choice.encode_to_vec(),
        }
        .id();
        let theirs = signature(&theirs).map_err(WireError::failure)?;
        let source = self.hello.offer.clone().unwrap_or_default();
        let checked = if !self.peer.verify(&confirm_message(Side::Source, &id), &theirs) {
            Err(forged("confirm"))
        } else {
            permits(&choice, &source, &offer).map_err(|why| {
                let text = format!("the source chose what was not offered: {why}");
                Failure::new(
                    "downgrade",
                    Blame::PeerMisbehaving,
                    text,
                    "compare both agents' versions and policies",
                )
            })
        };
        if let Err(failure) = checked {
            let _ = write_message(&mut self.writer, refusal(&failure)).await;
            return Err(failure);
        }
        let signed = key.sign(&confirm_message(Side::Destination, &id)).to_vec();
        let offers = Offers { source, destination: offer };
        let session = Session::new(id, Side::Destination, key, self.peer, choice, offers)
            .map_err(WireError::failure)?;
        register(&session);
        write_message(&mut self.writer, Body::Confirmed(Confirmed { signature: signed }))
            .await
            .map_err(WireError::failure)?;
        Ok(Some((session, self.reader, self.writer)))
    }
}

/// A connection that belongs to the session, but was not yet told so.
pub(crate) struct Arrival {
    pub(crate) purpose: Purpose,
    pub(crate) leg: u32,
    pub(crate) link: u32,
    /// Whether it is plain TCP: nothing but the join's signature was proved.
    pub(crate) plain: bool,
    /// Whether it is QUIC, as protected as TLS over TCP.
    pub(crate) quic: bool,
    binding: [u8; 32],
    reader: Reader,
    writer: Writer,
}

impl Joining {
    /// The session that it names, if it can be one.
    pub(crate) fn session(&self) -> Option<SessionId> {
        Some(SessionId(bytes32(&self.join.session).ok()?))
    }

    /// Refuses.
    pub(crate) async fn refuse(mut self, failure: &Failure) {
        let _ = write_message(&mut self.writer, refusal(failure)).await;
    }

    /// Holds the join against its session: signed by the session's source, over this very connection. Whether the connection
    /// is as protected as was agreed is for its leg to judge: see [`Arrival::belongs`].
    pub(crate) fn authenticate(self: Box<Self>, session: &Session) -> Result<Arrival, (Box<Self>, Failure)> {
        let purpose = Purpose::try_from(self.join.purpose).ok();
        let signed = signature(&self.join.signature).ok();
        let (Some(purpose), Some(signed)) = (purpose, signed) else {
            return Err((self, forged("join")));
        };
        let right_kind = match &self.peer {
            Some(peer) => peer == &session.peer,
            None => purpose != Purpose::Control,
        };
        let message = join_message(&session.id, purpose, self.join.leg, self.join.link, &self.binding);
        let theirs = right_kind && session.peer.verify(&message, &signed);
        if !theirs && !Mechanism::JoinSignature.is_off() {
            return Err((self, forged("join")));
        }
        let Joining { join, binding, peer, quic, reader, writer } = *self;
        let plain = peer.is_none();
        Ok(Arrival { purpose, leg: join.leg, link: join.link, plain, quic, binding, reader, writer })
    }
}

impl Arrival {
    /// Whether it is a data connection of this leg, as protected as was agreed.
    pub(crate) fn belongs(&self, leg: &Leg) -> bool {
        let purpose = match leg.path {
            Path::V1 => Purpose::Bytes,
            Path::V3 => Purpose::Chunks,
        };
        let link = self.link < leg.choice.streams;
        self.leg == leg.number && self.purpose == purpose && link && self.plain == leg.choice.plain
    }

    /// Accepts: the source may go on from `next` and `applied`.
    pub(crate) async fn accept(
        mut self,
        session: &Session,
        next: u64,
        applied: u64,
    ) -> Result<(Reader, Writer), WireError> {
        let message = joined_message(&session.id, next, applied, &self.binding);
        let joined = Joined { next, applied, signature: session.key.sign(&message).to_vec() };
        if self.purpose != Purpose::Control {
            self.reader.widen();
        }
        write_message(&mut self.writer, Body::Joined(joined)).await?;
        Ok((self.reader, self.writer))
    }

    /// Refuses.
    pub(crate) async fn refuse(mut self, failure: &Failure) {
        let _ = write_message(&mut self.writer, refusal(failure)).await;
    }
}
