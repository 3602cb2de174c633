//! A man in the middle of two agents *inside* TLS: he holds both nodes' keys, so each side believes that he is the other.
//!
//! ```text
//!   agent a ══ TLS as b ══► Middle ══ TLS as a ══► agent b
//!              session near          session far
//! ```
//! The sessions differ, since each is bound to its own connection. So everything signed is opened and signed anew: the
//! handshake, joins, chunks with their chain of hashes, the handover. What he does besides is the test's [`Attack`];
//! without one a migration through him succeeds, which shows that an attack is refused for its own sake.
//!
//! It follows one data connection on one path: `--streams 1`, and no change of path.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use dwcp_link::{Connection, DialOptions, Identity, ListenOptions, Listener, Peers, Reader, Writer, dial};
use dwcp_proto::chunk::{HEADER_LEN, Kind, SIGNED_HEADER_LEN};
use dwcp_proto::frame::{HEAD_LEN, Head, Tag};
use dwcp_proto::handover::{Message as Word, Transfer};
use dwcp_proto::message::{Body, Confirm, Confirmed, Join, Joined, Message, Purpose};
use dwcp_proto::session::{Transcript, confirm_message, join_message, joined_message};
use dwcp_proto::{ChunkHeader, NodeKey, Seq, SessionId, Side, signed};
use dwcp_tests::Agent;
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;

/// Far more than any honest frame has.
const MAX_FRAME: usize = 8 << 20;

/// A chunk of the source on its way.
#[derive(Debug, Clone)]
pub(crate) struct Chunk {
    /// Its header; whatever is changed in it is signed, too, if [`Pen::seal`] seals it.
    pub(crate) header: ChunkHeader,
    /// Its payload.
    pub(crate) payload: Vec<u8>,
}

impl Chunk {
    /// Another payload, with the digest and the lengths that belong to it.
    pub(crate) fn with_payload(mut self, payload: Vec<u8>) -> Self {
        self.header.digest = *blake3::hash(&payload).as_bytes();
        self.header.wire_len = payload.len() as u32;
        self.payload = payload;
        self
    }
}

/// A chunk as it goes on the wire to the destination.
#[derive(Debug, Clone)]
pub(crate) struct Sealed {
    pub(crate) header: [u8; HEADER_LEN],
    pub(crate) signature: [u8; 64],
    pub(crate) payload: Vec<u8>,
}

/// Signs chunks in the source's name.
#[derive(Debug)]
pub(crate) struct Pen {
    key: Arc<NodeKey>,
    session: SessionId,
    prev: [u8; 32],
    sealed: BTreeMap<Seq, ChunkHeader>,
    /// Nothing of the VMM's stream may be applied from here on.
    barred_from: Option<u64>,
}

impl Pen {
    /// Seals the next chunk, or one that was sealed before once more. Its hash of the header before is set right.
    pub(crate) fn seal(&mut self, chunk: Chunk) -> Sealed {
        let header = match self.sealed.get(&chunk.header.seq) {
            Some(known) => known.clone(),
            None => {
                let header = ChunkHeader { prev: self.prev, ..chunk.header };
                self.prev = header.hash();
                self.sealed.insert(header.seq, header.clone());
                header
            }
        };
        self.sign(&header, chunk.payload)
    }

    /// Signs a header just as it is.
    pub(crate) fn sign(&self, header: &ChunkHeader, payload: Vec<u8>) -> Sealed {
        let header = header.to_bytes();
        let message = [b"dwcp v3 chunk\0", &self.session.0[..], &header].concat();
        Sealed { header, signature: self.key.sign(&message), payload }
    }

    /// What the next header holds as the hash of the one before it.
    pub(crate) fn prev(&self) -> [u8; 32] {
        self.prev
    }

    /// The attack begins: nothing of this chunk or after it may be applied.
    pub(crate) fn bar(&mut self, chunk: &Chunk) {
        self.barred_from.get_or_insert(chunk.header.offset.0);
    }
}

/// Speaks to one side in the other one's name.
#[derive(Debug, Clone)]
pub(crate) struct Voice {
    key: Arc<NodeKey>,
    side: Side,
    session: SessionId,
}

impl Voice {
    /// A message of the handover, signed.
    pub(crate) fn say(&self, word: &Word) -> Body {
        Body::Signed(signed::sign(&self.key, self.side, &self.session, word))
    }
}

type OnChunk = Box<dyn FnMut(Chunk, &mut Pen) -> Vec<Sealed> + Send>;
type OnBody = Box<dyn FnMut(Body, &Voice) -> Vec<Body> + Send>;
type OnWord = Box<dyn FnMut(&Word) -> bool + Send>;

/// What the man in the middle does; by itself nothing.
pub(crate) struct Attack {
    chunk: OnChunk,
    to_source: OnBody,
    to_destination: OnBody,
    /// Whether a word of the destination is lost.
    loses: OnWord,
}

impl Attack {
    pub(crate) fn none() -> Self {
        Attack {
            chunk: Box::new(|chunk, pen| vec![pen.seal(chunk)]),
            to_source: Box::new(|body, _| vec![body]),
            to_destination: Box::new(|body, _| vec![body]),
            loses: Box::new(|_| false),
        }
    }

    /// What goes to the destination in place of each chunk.
    pub(crate) fn chunks(act: impl FnMut(Chunk, &mut Pen) -> Vec<Sealed> + Send + 'static) -> Self {
        Attack { chunk: Box::new(act), ..Attack::none() }
    }

    /// What goes to the source in place of each message of the destination, whose signature is right already.
    pub(crate) fn to_source(act: impl FnMut(Body, &Voice) -> Vec<Body> + Send + 'static) -> Self {
        Attack { to_source: Box::new(act), ..Attack::none() }
    }

    /// The same towards the destination.
    pub(crate) fn to_destination(act: impl FnMut(Body, &Voice) -> Vec<Body> + Send + 'static) -> Self {
        Attack { to_destination: Box::new(act), ..Attack::none() }
    }

    /// Loses those of the destination's words of the handover for which this is true.
    pub(crate) fn losing(act: impl FnMut(&Word) -> bool + Send + 'static) -> Self {
        Attack { loses: Box::new(act), ..Attack::none() }
    }

    /// Both at once.
    pub(crate) fn and_to_source(self, act: impl FnMut(Body, &Voice) -> Vec<Body> + Send + 'static) -> Self {
        Attack { to_source: Box::new(act), ..self }
    }
}

/// The man in the middle, until he is dropped.
pub(crate) struct Middle {
    address: SocketAddr,
    shared: Arc<Shared>,
    _runtime: Runtime,
}

impl Middle {
    /// Stands between `a` and `b` with both nodes' keys.
    pub(crate) fn start(a: &Agent, b: &Agent, attack: Attack) -> Result<Self> {
        Middle::start_towards(a, b, b.listen()?.data, attack)
    }

    /// The same, where `b` is reached at this address.
    pub(crate) fn start_towards(a: &Agent, b: &Agent, to: SocketAddr, attack: Attack) -> Result<Self> {
        let (a_key, b_key) = (key(a)?, key(b)?);
        let peers = Arc::new(Peers::of([a_key.public(), b_key.public()]));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let as_b = Identity::new(b_key.clone(), peers.clone())?;
        let shared = Arc::new(Shared {
            to,
            as_a: Identity::new(a_key.clone(), peers)?,
            a: a_key,
            b: b_key,
            session: Mutex::new(None),
            attack: Mutex::new(attack),
            applied: Mutex::new(0),
        });
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut listener = runtime.block_on(Listener::bind(anywhere, &as_b, ListenOptions::default()))?;
        let address = listener.local_addr();
        let serving = shared.clone();
        runtime.spawn(async move {
            while let Some(near) = listener.accept().await {
                let shared = serving.clone();
                tokio::spawn(async move { shared.carry(near).await });
            }
        });
        Ok(Middle { address, shared, _runtime: runtime })
    }

    /// Where he pretends to be `b`, as `--to` takes it.
    pub(crate) fn target(&self) -> String {
        format!("b={}", self.address)
    }

    /// Fails if the destination acknowledged anything from where the attack began.
    pub(crate) fn nothing_barred_was_applied(&self) -> Result<()> {
        let applied = *lock(&self.shared.applied);
        if let Some(from) = lock(&self.shared.session).as_ref().and_then(|session| session.pen.barred_from) {
            ensure!(
                applied <= from,
                "byte {applied} of the stream was applied, and all from {from} is forged"
            );
        }
        Ok(())
    }
}

/// The secret key of an agent's node.
pub(crate) fn key(agent: &Agent) -> Result<Arc<NodeKey>> {
    let path = agent.dir().join(format!("{}.key", agent.node()));
    read_key(&path)
}

/// The secret key in a file.
pub(crate) fn read_key(path: &Path) -> Result<Arc<NodeKey>> {
    Ok(Arc::new(NodeKey::parse(&std::fs::read_to_string(path)?)?))
}

struct Shared {
    to: SocketAddr,
    as_a: Identity,
    a: Arc<NodeKey>,
    b: Arc<NodeKey>,
    session: Mutex<Option<Session>>,
    attack: Mutex<Attack>,
    /// Bytes of the VMM's stream that the destination said it has applied.
    applied: Mutex<u64>,
}

struct Session {
    near: SessionId,
    far: SessionId,
    pen: Pen,
    /// The whole transfer as either side names it, once its end has passed.
    whole: Option<(Transfer, Transfer)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    async fn carry(self: Arc<Self>, near: Connection) -> Result<()> {
        let far = dial(self.to, &self.as_a, self.b.node(), &DialOptions::default()).await?;
        let bindings = near.exporter().zip(far.exporter()).context("both are TLS")?;
        let (mut near, mut far) = (near.into_split(), far.into_split());
        match read(&mut near.0).await? {
            Frame::Message(Body::Hello(_), hello) => {
                self.greet(&mut near, &mut far, bindings, hello).await?;
                self.talk(near, far).await
            }
            Frame::Message(Body::Join(join), _) => {
                let purpose = Purpose::try_from(join.purpose)?;
                if !self.join(&mut near, &mut far, bindings, join).await? {
                    return Ok(());
                }
                match purpose {
                    Purpose::Control => self.talk(near, far).await,
                    Purpose::Chunks => self.pass_chunks(near, far).await,
                    Purpose::Bytes => pass_bytes(near, far).await,
                }
            }
            other => bail!("{other:?} at the beginning"),
        }
    }

    /// `Hello` to `Confirmed`, each side's signatures over its own session.
    async fn greet(
        &self,
        near: &mut (Reader, Writer),
        far: &mut (Reader, Writer),
        bindings: ([u8; 32], [u8; 32]),
        hello: Vec<u8>,
    ) -> Result<()> {
        write_bytes(&mut far.1, &hello).await?;
        let Frame::Message(body, welcome) = read(&mut far.0).await? else { bail!("no welcome") };
        write_bytes(&mut near.1, &welcome).await?;
        ensure!(matches!(body, Body::Welcome(_)), "{}", body.kind());
        let Frame::Message(Body::Confirm(confirm), _) = read(&mut near.0).await? else { bail!("no confirm") };
        let choice = confirm.choice.clone().context("a choice")?;
        let id = |exporter: &[u8; 32]| {
            let (hello, welcome, choice) = (&hello[..], &welcome[..], &choice.encode_to_vec()[..]);
            let (source, destination) = (self.a.public(), self.b.public());
            let (source, destination) = (source.as_bytes(), destination.as_bytes());
            Transcript { exporter, source, destination, hello, welcome, choice }.id()
        };
        let (near_id, far_id) = (id(&bindings.0), id(&bindings.1));
        let signature = self.a.sign(&confirm_message(Side::Source, &far_id)).to_vec();
        let pen = Pen {
            key: self.a.clone(),
            session: far_id,
            prev: far_id.0,
            sealed: BTreeMap::new(),
            barred_from: None,
        };
        *lock(&self.session) = Some(Session { near: near_id, far: far_id, pen, whole: None });
        write(&mut far.1, Body::Confirm(Confirm { choice: Some(choice), signature })).await?;
        let Frame::Message(body, _) = read(&mut far.0).await? else { bail!("no answer") };
        let body = match body {
            Body::Confirmed(_) => Body::Confirmed(Confirmed {
                signature: self.b.sign(&confirm_message(Side::Destination, &near_id)).to_vec(),
            }),
            refused => refused,
        };
        write(&mut near.1, body).await
    }

    /// `Join` and its answer; false if it was refused.
    async fn join(
        &self,
        near: &mut (Reader, Writer),
        far: &mut (Reader, Writer),
        bindings: ([u8; 32], [u8; 32]),
        join: Join,
    ) -> Result<bool> {
        let (near_id, far_id) = self.ids()?;
        let purpose = Purpose::try_from(join.purpose)?;
        let signature =
            self.a.sign(&join_message(&far_id, purpose, join.leg, join.link, &bindings.1)).to_vec();
        write(&mut far.1, Body::Join(Join { session: far_id.0.to_vec(), signature, ..join })).await?;
        let Frame::Message(body, _) = read(&mut far.0).await? else { bail!("no answer to a join") };
        let Body::Joined(joined) = body else {
            write(&mut near.1, body).await?;
            return Ok(false);
        };
        let message = joined_message(&near_id, joined.next, joined.applied, &bindings.0);
        let signature = self.b.sign(&message).to_vec();
        write(&mut near.1, Body::Joined(Joined { signature, ..joined })).await?;
        Ok(true)
    }

    /// Messages both ways, until either side hangs up.
    async fn talk(&self, near: (Reader, Writer), far: (Reader, Writer)) -> Result<()> {
        let ((mut near_r, mut near_w), (mut far_r, mut far_w)) = (near, far);
        let forth = async {
            loop {
                let Frame::Message(body, _) = read(&mut near_r).await? else {
                    bail!("a chunk among messages")
                };
                for body in self.to_destination(body)? {
                    write(&mut far_w, body).await?;
                }
            }
        };
        let back = async {
            loop {
                let Frame::Message(body, _) = read(&mut far_r).await? else {
                    bail!("a chunk among messages")
                };
                for body in self.to_source(body)? {
                    write(&mut near_w, body).await?;
                }
            }
        };
        tokio::select! { outcome = forth => outcome, outcome = back => outcome }
    }

    async fn pass_chunks(&self, near: (Reader, Writer), far: (Reader, Writer)) -> Result<()> {
        let ((mut near_r, mut near_w), (mut far_r, mut far_w)) = (near, far);
        let forth = async {
            loop {
                let Frame::Chunk(chunk) = read(&mut near_r).await? else { bail!("a message among chunks") };
                for sealed in self.chunk(chunk)? {
                    far_w.write_all(&Head::CHUNK.to_bytes()).await?;
                    far_w.write_all(&sealed.header).await?;
                    far_w.write_all(&sealed.signature).await?;
                    far_w.write_all(&sealed.payload).await?;
                    far_w.flush().await?;
                }
            }
        };
        tokio::select! {
            outcome = forth => outcome,
            outcome = tokio::io::copy(&mut far_r, &mut near_w) => Ok(outcome.map(drop)?),
        }
    }

    fn chunk(&self, chunk: Chunk) -> Result<Vec<Sealed>> {
        let mut session = lock(&self.session);
        let session = session.as_mut().context("chunks come after the handshake")?;
        let (end, near_root, stream_len) =
            (chunk.header.kind == Kind::End, chunk.header.hash(), chunk.header.offset.0);
        let sealed = (lock(&self.attack).chunk)(chunk, &mut session.pen);
        if end {
            let transfer = |root| Transfer { stream_len, root };
            session.whole = Some((transfer(near_root), transfer(session.pen.prev())));
        }
        Ok(sealed)
    }

    fn to_destination(&self, body: Body) -> Result<Vec<Body>> {
        let (near, far) = self.ids()?;
        if let (Body::StreamEnd(end), Some(session)) = (&body, lock(&self.session).as_mut()) {
            let transfer = |id| Transfer { stream_len: end.length, root: bytes_root(id, end.length) };
            session.whole = Some((transfer(&near), transfer(&far)));
        }
        let voice = Voice { key: self.a.clone(), side: Side::Source, session: far };
        let body = match &body {
            Body::Signed(signed) => match signed::open(&self.a.public(), Side::Source, &near, signed)? {
                Word::Commit { receipt, run } => {
                    let receipt = match self.whole() {
                        Some((near, far)) if near.digest() == receipt => far.digest(),
                        _ => receipt,
                    };
                    voice.say(&Word::Commit { receipt, run })
                }
                word => voice.say(&word),
            },
            _ => body,
        };
        Ok((lock(&self.attack).to_destination)(body, &voice))
    }

    fn to_source(&self, body: Body) -> Result<Vec<Body>> {
        let (near, far) = self.ids()?;
        let voice = Voice { key: self.b.clone(), side: Side::Destination, session: near };
        let body = match &body {
            Body::Signed(signed) => match signed::open(&self.b.public(), Side::Destination, &far, signed)? {
                Word::Receipt(transfer) => {
                    let transfer = match self.whole() {
                        Some((near, far)) if far == transfer => near,
                        _ => transfer,
                    };
                    voice.say(&Word::Receipt(transfer))
                }
                word => voice.say(&word),
            },
            Body::Ack(ack) => {
                let mut applied = lock(&self.applied);
                *applied = ack.applied.max(*applied);
                body
            }
            _ => body,
        };
        let opened = match &body {
            Body::Signed(signed) => signed::open(&self.b.public(), Side::Destination, &near, signed).ok(),
            _ => None,
        };
        let mut attack = lock(&self.attack);
        if opened.is_some_and(|word| (attack.loses)(&word)) {
            return Ok(Vec::new());
        }
        Ok((attack.to_source)(body, &voice))
    }

    fn ids(&self) -> Result<(SessionId, SessionId)> {
        let session = lock(&self.session);
        let session = session.as_ref().context("no session yet")?;
        Ok((session.near, session.far))
    }

    fn whole(&self) -> Option<(Transfer, Transfer)> {
        lock(&self.session).as_ref().and_then(|session| session.whole)
    }
}

/// What stands for a whole v1 transfer: see `dwcp_proto::leg`.
fn bytes_root(session: &SessionId, length: u64) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("dwcp 2026-11 v1 root");
    *hasher.update(&session.0).update(&length.to_be_bytes()).finalize().as_bytes()
}

async fn pass_bytes(near: (Reader, Writer), far: (Reader, Writer)) -> Result<()> {
    let ((mut near_r, mut near_w), (mut far_r, mut far_w)) = (near, far);
    tokio::select! {
        outcome = tokio::io::copy(&mut near_r, &mut far_w) => outcome?,
        outcome = tokio::io::copy(&mut far_r, &mut near_w) => outcome?,
    };
    Ok(())
}

/// What one frame holds.
#[derive(Debug)]
pub(crate) enum Frame {
    /// A message, and its bytes as they travelled.
    Message(Body, Vec<u8>),
    Chunk(Chunk),
}

/// Reads the next frame. A message of a kind that is unknown here is an error.
pub(crate) async fn read(reader: &mut Reader) -> Result<Frame> {
    let mut head = [0; HEAD_LEN];
    reader.read_exact(&mut head).await?;
    let head = Head::parse(head, MAX_FRAME)?;
    match head.tag {
        Tag::Message => {
            let mut bytes = vec![0; head.len as usize];
            reader.read_exact(&mut bytes).await?;
            let body = Message::parse(&bytes)?.body.context("a message without a body")?;
            Ok(Frame::Message(body, bytes))
        }
        Tag::Chunk => {
            let mut signed = [0; SIGNED_HEADER_LEN];
            reader.read_exact(&mut signed).await?;
            let (header, _) = signed.split_first_chunk::<HEADER_LEN>().context("a header")?;
            let header = ChunkHeader::parse(header)?;
            let mut payload = vec![0; header.wire_len as usize];
            reader.read_exact(&mut payload).await?;
            Ok(Frame::Chunk(Chunk { header, payload }))
        }
    }
}

/// Writes one message.
pub(crate) async fn write(writer: &mut Writer, body: Body) -> Result<()> {
    write_bytes(writer, &Message::from(body).to_bytes()).await
}

async fn write_bytes(writer: &mut Writer, message: &[u8]) -> Result<()> {
    let head = Head { tag: Tag::Message, len: message.len() as u32 };
    writer.write_all(&[&head.to_bytes()[..], message].concat()).await?;
    Ok(writer.flush().await?)
}
