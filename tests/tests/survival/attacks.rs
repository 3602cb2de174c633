//! Attacks by a peer with a good key, or by somebody between: one test each, by its kind's name.
//!
//! After each: the guest runs on at the source (or has arrived whole, where the attack is to be shrugged off), nothing
//! forged was applied, exactly the attempts that were made are counted, the source's operator gets one code, and the
//! next migration succeeds.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use dwcp_link::{Connection, DialOptions, Identity, Peers, dial, dial_plain};
use dwcp_proto::chunk::Kind;
use dwcp_proto::frame::PLAIN_PREAMBLE;
use dwcp_proto::handover::{Message as Word, Transfer};
use dwcp_proto::limits::MAX_RAW_PAYLOAD;
use dwcp_proto::message::{Ack, Body, Join, Purpose, Signed};
use dwcp_proto::session::join_message;
use dwcp_proto::{Codec, NodeKey, NodeName, PageVersion, Seq, SessionId, StreamOffset};
use dwcp_tests::{Agent, AgentConfig, Ending, SimGuest, SimScene, attempts, until};
use tokio::io::AsyncWriteExt;
use tokio::runtime::Runtime;

use crate::middle::{Attack, Chunk, Frame, Middle, Pen, Sealed, key, read, write};

/// One stream that the man in the middle can follow, of compressed chunks.
const THROUGH: [&str; 8] =
    ["--path", "v3", "--mode", "internet", "--streams", "1", "--downtime-limit", "500ms"];
/// The chunk that is tampered with: in the middle of the first round.
const AT: Seq = Seq(5);
/// So often a chunk may come altered: `dwcp_proto::sender::MAX_NACKS`.
const PATIENCE: u64 = 3;

#[test]
fn without_an_attack_the_man_in_the_middle_is_not_noticed() -> Result<()> {
    for path in [&THROUGH[..], &["--path", "v1"]] {
        Case { path, ..Case::new(Attack::none()) }.moved("no attack", &[])?;
    }
    Ok(())
}

#[test]
fn payload_flip() -> Result<()> {
    // Once: the chunk is asked for again, and all is well.
    let mut flipped = false;
    let once = Attack::chunks(move |chunk, pen| {
        let flip = chunk.header.seq == AT && !std::mem::replace(&mut flipped, chunk.header.seq == AT);
        let mut sealed = pen.seal(chunk);
        if flip {
            sealed.payload[7] ^= 0x10;
        }
        vec![sealed]
    });
    Case::new(once).moved("payload_flip", &[("payload_flip", 1)])?;

    // Every time: whoever alters data is there to stay.
    let always = at(|chunk, pen| {
        let mut sealed = pen.seal(chunk);
        sealed.payload[7] ^= 0x10;
        vec![sealed]
    });
    Case::new(always).refused("payload_flip", "integrity", &[], &[("payload_flip", PATIENCE)])
}

#[test]
fn header_flip() -> Result<()> {
    // A reserved byte, which no header of this format has set.
    let reserved = at(|chunk, pen| {
        let mut sealed = pen.seal(chunk);
        sealed.header[3] = 1;
        vec![sealed]
    });
    Case::new(reserved).refused("header_flip", "integrity", &[], &[("header_flip", 1)])?;

    // Offset and stream length, in turn: legal values, but not what was signed.
    for byte in [14, 39] {
        let moved = at(move |chunk, pen| {
            let mut sealed = pen.seal(chunk);
            sealed.header[byte] ^= 1;
            vec![sealed]
        });
        Case::new(moved).refused("header_flip", "integrity", &[], &[("sig_forge", 1)])?;
    }
    Ok(())
}

#[test]
fn sig_forge() -> Result<()> {
    let forge = at(|chunk, pen| vec![Sealed { signature: [0x5a; 64], ..pen.seal(chunk) }]);
    Case::new(forge).refused("sig_forge", "integrity", &[], &[("sig_forge", 1)])
}

/// The right session and the right chunk, signed with a key that is trusted, but not the source's.
#[test]
fn wrong_signer() -> Result<()> {
    let stranger = NodeKey::from_seed(NodeName::new("a")?, &[9; 32]);
    let sign = at(move |chunk, pen| {
        let sealed = pen.seal(chunk);
        vec![Sealed { signature: stranger.sign(&sealed.header), ..sealed }]
    });
    Case::new(sign).refused("wrong_signer", "integrity", &[], &[("sig_forge", 1)])
}

/// Not counted: an honest source, too, sends again what it has no acknowledgement for when a connection is lost.
#[test]
fn replay_chunk() -> Result<()> {
    let twice = at(|chunk, pen| {
        let sealed = pen.seal(chunk);
        vec![sealed.clone(), sealed]
    });
    Case::new(twice).moved("replay_chunk", &[])
}

/// Chunks of an earlier migration of the same guest between the same nodes, in the place of today's.
#[test]
fn replay_session() -> Result<()> {
    let recorded = Arc::new(Mutex::new(BTreeMap::new()));
    let record = {
        let recorded = recorded.clone();
        Attack::chunks(move |chunk, pen| {
            let seq = chunk.header.seq;
            let sealed = pen.seal(chunk);
            recorded.lock().unwrap_or_else(PoisonError::into_inner).insert(seq, sealed.clone());
            vec![sealed]
        })
    };
    let Some(mut scene) = Case::new(record).play("replay_session")? else { return Ok(()) };
    ensure!(scene.ending_of_guests()? == Ending::Moved);
    let replay = at(move |chunk, _| {
        let recorded = recorded.lock().unwrap_or_else(PoisonError::into_inner);
        recorded.get(&chunk.header.seq).cloned().into_iter().collect()
    });
    scene.fresh_source()?;
    scene.fresh_destination()?;
    let middle = Middle::start(&scene.a, &scene.b, replay)?;
    scene.via = Some(middle.target());
    scene.incoming()?;
    scene.migrate(&THROUGH)?.refused_as("integrity")?;
    stayed(&mut scene, &middle, &[], &[("sig_forge", 1)])
}

/// The end comes early: whoever signs it has all the right numbers, but the guest is not whole.
#[test]
fn truncate() -> Result<()> {
    let mut ended = false;
    let cut = Attack::chunks(move |chunk, pen| match chunk.header.seq {
        _ if ended => Vec::new(),
        AT => {
            ended = true;
            pen.bar(&chunk);
            vec![end(&chunk, pen)]
        }
        _ => vec![pen.seal(chunk)],
    });
    // The destination's own acknowledgement of the early end does not fit what the source has sent. Its data path gives
    // up with that, and its VMM, whose socket closes, with that: either may be heard first.
    let Some((mut scene, middle, said)) = Case::new(cut).run("truncate")? else { return Ok(()) };
    let said = said.refusal()?;
    ensure!(said.contains("error: forged_ack") || said.contains("error: vmm_failed_source"), "{said}");
    ensure!(attempts(&scene.b)?.is_empty());
    let found = attempts(&scene.a)?;
    ensure!(found.keys().all(|kind| kind == "forged_ack"), "{found:?}");
    let at_source: Vec<_> = found.values().map(|count| ("forged_ack", *count)).collect();
    stayed(&mut scene, &middle, &at_source, &[])
}

#[test]
fn extend() -> Result<()> {
    let go_on = Attack::chunks(|chunk, pen| {
        let late = (chunk.header.kind == Kind::End).then(|| {
            let mut late = chunk.clone().with_payload(vec![1; 64]);
            late.header.kind = Kind::Data;
            (late.header.stream_len, late.header.raw_len) = (48, 64);
            late.header.seq = chunk.header.seq.next();
            late
        });
        let sealed = pen.seal(chunk);
        [sealed].into_iter().chain(late.map(|late| pen.seal(late))).collect()
    });
    Case::new(go_on).refused("extend", "integrity", &[], &[("extend", 1)])
}

/// A chunk is left out and the next one takes its number, so that only the stream itself has a gap.
#[test]
fn omit() -> Result<()> {
    let renumber = Attack::chunks(|mut chunk, pen| match chunk.header.seq {
        AT => {
            pen.bar(&chunk);
            Vec::new()
        }
        seq if seq > AT => {
            chunk.header.seq = Seq(seq.0 - 1);
            vec![pen.seal(chunk)]
        }
        _ => vec![pen.seal(chunk)],
    });
    Case::new(renumber).refused("omit", "integrity", &[], &[("omit", 1)])
}

/// Two chunks change places: under their own numbers that is what several connections do anyway, under each other's it
/// breaks the stream.
#[test]
fn reorder() -> Result<()> {
    let mut held = None;
    let late = Attack::chunks(move |chunk, pen| {
        let sealed = pen.seal(chunk.clone());
        match chunk.header.seq {
            AT => {
                held = Some(sealed);
                Vec::new()
            }
            _ => [sealed].into_iter().chain(held.take()).collect(),
        }
    });
    Case::new(late).moved("reorder", &[])?;

    let mut held: Option<Chunk> = None;
    let swapped = Attack::chunks(move |mut chunk, pen| match (chunk.header.seq, held.take()) {
        (AT, _) => {
            pen.bar(&chunk);
            held = Some(chunk);
            Vec::new()
        }
        (seq, Some(mut first)) => {
            chunk.header.seq = AT;
            first.header.seq = seq;
            vec![pen.seal(chunk), pen.seal(first)]
        }
        _ => vec![pen.seal(chunk)],
    });
    Case::new(swapped).refused("reorder", "integrity", &[], &[("omit", 1)])
}

#[test]
fn old_round() -> Result<()> {
    let newer = Attack::chunks(|mut chunk, pen| {
        match chunk.header.seq {
            AT => chunk.header.version = PageVersion(u32::MAX),
            seq if seq == AT.next() => pen.bar(&chunk),
            _ => {}
        }
        vec![pen.seal(chunk)]
    });
    Case::new(newer).refused("old_round", "integrity", &[], &[("old_round", 1)])
}

/// Two chunks, both well signed, under one number. The one before is held back, so that the first of them still waits.
#[test]
fn equivocation() -> Result<()> {
    let mut before = None;
    let two = Attack::chunks(move |chunk, pen| match chunk.header.seq {
        seq if seq.next() == AT => {
            pen.bar(&chunk);
            before = Some(pen.seal(chunk));
            Vec::new()
        }
        AT => {
            let other = chunk.clone().with_payload(vec![7; chunk.payload.len()]);
            let first = pen.seal(chunk);
            vec![first, pen.sign(&other.header, other.payload)].into_iter().chain(before.take()).collect()
        }
        _ => vec![pen.seal(chunk)],
    });
    Case::new(two).refused("equivocation", "integrity", &[], &[("equivocation", 1)])
}

/// A frame that holds a gigabyte, a block that holds more than was announced, and lengths beyond any limit.
#[test]
fn zip_bomb() -> Result<()> {
    for (codec, payload) in [(Codec::Zstd, gigabyte()), (Codec::Lz4, vec![0xff; 4000])] {
        let bomb = at(move |mut chunk, pen| {
            chunk.header.codec = codec;
            chunk.header.raw_len = 4096;
            vec![pen.seal(chunk.with_payload(payload.clone()))]
        });
        Case::new(bomb).refused("zip_bomb", "integrity", &[], &[("zip_bomb", 1)])?;
    }
    let huge = at(|mut chunk, pen| {
        chunk.header.raw_len = MAX_RAW_PAYLOAD as u32 + 1;
        vec![pen.seal(chunk)]
    });
    Case::new(huge).refused("len_overflow", "integrity", &[], &[("len_overflow", 1)])
}

#[test]
fn unknown_codec() -> Result<()> {
    let codec = at(|chunk, pen| {
        let mut sealed = pen.seal(chunk);
        sealed.header[2] = 9;
        vec![sealed]
    });
    Case::new(codec).refused("unknown_codec", "integrity", &[], &[("unknown_codec", 1)])
}

/// A page past the end of every RAM block.
#[test]
fn oob_page() -> Result<()> {
    let outside = at(|mut chunk, pen| {
        // The format of `dwcp_hde::format`: one name, one run of zero pages from beyond the last page that there can be.
        let table = [&[3][..], b"ram", &[0x83, 0], &varint(1 << 52), &[1]].concat();
        let mut payload = vec![1, 0, 0, 1];
        for len in [table.len(), 0, 0] {
            payload.extend_from_slice(&(len as u32).to_be_bytes());
        }
        payload.extend_from_slice(&table);
        chunk.header.codec = Codec::Raw;
        chunk.header.raw_len = payload.len() as u32;
        vec![pen.seal(chunk.with_payload(payload))]
    });
    Case::new(outside).refused("oob_page", "integrity", &[], &[("oob_page", 1)])
}

/// The destination's own key, but another root, or a receipt for a guest that has not arrived.
#[test]
fn forged_receipt() -> Result<()> {
    let other_root = Attack::to_source(|body, voice| match body {
        Body::Signed(_) => {
            vec![voice.say(&Word::Receipt(Transfer { stream_len: 1 << 20, root: [7; 32] }))]
        }
        body => vec![body],
    });
    Case::new(other_root).refused("forged_receipt", "forged_receipt", &[("forged_receipt", 1)], &[])?;

    // Long before the guest is whole; the true one is held back.
    let mut said = false;
    let early = Attack::to_source(move |body, voice| match body {
        Body::Ack(Ack { next: 3.., .. }) if !std::mem::replace(&mut said, true) => {
            let transfer = Transfer { stream_len: 1 << 20, root: [7; 32] };
            vec![voice.say(&Word::Receipt(transfer)), body]
        }
        Body::Signed(_) => Vec::new(),
        body => vec![body],
    });
    Case::new(early).refused("forged_receipt", "forged_receipt", &[("forged_receipt", 1)], &[])
}

/// A receipt that the destination has not signed, for just what was delivered.
#[test]
fn forged_word() -> Result<()> {
    let mut forged = false;
    let forge = Attack::to_source(move |body, _| match body {
        Body::Signed(signed) if !std::mem::replace(&mut forged, true) => {
            vec![Body::Signed(Signed { signature: vec![0x5a; 64], ..signed })]
        }
        body => vec![body],
    });
    Case::new(forge).refused("forged_word", "protocol", &[("protocol", 1)], &[])
}

#[test]
fn forged_ack() -> Result<()> {
    let ahead = || {
        Attack::to_source(|body, _| match body {
            Body::Ack(ack) if ack.applied > 0 => {
                vec![Body::Ack(Ack { next: ack.next + 10_000, applied: ack.applied + (1 << 40), ..ack })]
            }
            body => vec![body],
        })
    };
    Case::new(ahead()).refused("forged_ack", "forged_ack", &[("forged_ack", 1)], &[])?;
    Case { path: &["--path", "v1"], ..Case::new(ahead()) }.refused(
        "forged_ack",
        "forged_ack",
        &[("forged_ack", 1)],
        &[],
    )
}

/// Each side hears its own words back.
#[test]
fn reflect() -> Result<()> {
    // The source's commit, as if the destination had said it. It has decided and keeps to it.
    let heard = Arc::new(Mutex::new(None));
    let listen = heard.clone();
    let both = Attack::to_destination(move |body, _| {
        if let Body::Signed(_) = &body {
            listen.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(body.clone());
        }
        vec![body]
    })
    .and_to_source(move |body, _| {
        let own = heard.lock().unwrap_or_else(PoisonError::into_inner).take();
        own.into_iter().chain([body]).collect()
    });
    Case::new(both).moved_with("reflect", &[("protocol", 1)], &[])?;

    // What only a destination says: an acknowledgement.
    let mut said = false;
    let back = Attack::to_destination(move |body, _| match body {
        Body::Ping(_) if !std::mem::replace(&mut said, true) => vec![Body::Ack(Ack::default()), body],
        body => vec![body],
    });
    Case::new(back).refused("reflect", "peer_violation", &[], &[("protocol", 1)])
}

/// A commit that the source never gave: the destination is to run its guest while the source's runs.
#[test]
fn double_resume() -> Result<()> {
    let mut said = false;
    let early = Attack::to_destination(move |body, voice| match body {
        Body::Ping(_) if !std::mem::replace(&mut said, true) => {
            vec![voice.say(&Word::Commit { receipt: [7; 32], run: true }), body]
        }
        body => vec![body],
    });
    Case::new(early).refused("double_resume", "peer_violation", &[], &[("protocol", 1)])
}

/// Somebody whose key nobody knows, and somebody who is trusted but is not this session's source.
#[test]
fn unknown_peer() -> Result<()> {
    let Some((mut scene, session)) = under_way("unknown_peer", AgentConfig::default(), &[])? else {
        return Ok(());
    };
    let runtime = Runtime::new()?;
    let stranger = Arc::new(NodeKey::from_seed(NodeName::new("stranger")?, &[9; 32]));
    let peers = Arc::new(Peers::of([key(&scene.b)?.public()]));
    let identity = Identity::new(stranger.clone(), peers)?;
    let address = scene.b.listen()?.data;
    let refused: Result<Frame> = runtime.block_on(async {
        // TLS 1.3: the client is done before the server has looked at its key; the refusal comes with the first read.
        let connection = dial(address, &identity, &NodeName::new("b")?, &DialOptions::default()).await?;
        let (mut reader, _writer) = connection.into_split();
        read(&mut reader).await
    });
    ensure!(refused.is_err(), "a stranger was let in");
    scene.a.ctl(&[&"cancel", &"m1"])?.success()?;
    ensure!(scene.ending("m1")? == Ending::Stayed);
    ensure!(!session.0.is_empty() && attempts(&scene.b)?.is_empty());
    scene.again()
}

/// A v1 data connection that somebody guessed, who knows the session's id and everything but the key: in the plain, and
/// inside the TLS of a node that is trusted.
#[test]
fn v1_hijack() -> Result<()> {
    let plain = AgentConfig { v1_plain: true, ..AgentConfig::default() };
    let arguments = ["--path", "v1", "--mode", "datacenter"];
    let Some((mut scene, session)) = under_way("v1_hijack", plain, &arguments)? else { return Ok(()) };
    let runtime = Runtime::new()?;
    let address = scene.b.listen()?.data;
    let stranger = NodeKey::from_seed(NodeName::new("stranger")?, &[9; 32]);
    for purpose in [Purpose::Bytes, Purpose::Chunks] {
        let answer = runtime.block_on(async {
            let connection = dial_plain(address, &DialOptions::default()).await?;
            join(connection, &session, purpose, &stranger).await
        })?;
        let Body::Refused(refused) = answer else { anyhow::bail!("{} for a forged join", answer.kind()) };
        ensure!(refused.code == "signature", "{refused:?}");
    }
    // The migration does not notice.
    scene.a.ctl(&[&"cancel", &"m1"])?.success()?;
    ensure!(scene.ending("m1")? == Ending::Stayed);
    let counted = BTreeMap::from([("sig_forge".to_owned(), 1), ("v1_hijack".to_owned(), 1)]);
    let found = attempts(&scene.b)?;
    ensure!(found == counted, "{found:?}");
    scene.again()
}

/// Asks to join `session` with a signature of `key`.
async fn join(connection: Connection, session: &SessionId, purpose: Purpose, key: &NodeKey) -> Result<Body> {
    let (mut reader, mut writer) = connection.into_split();
    writer.write_all(&PLAIN_PREAMBLE).await?;
    let Frame::Message(Body::Challenge(challenge), _) = read(&mut reader).await? else {
        anyhow::bail!("no challenge")
    };
    let binding = challenge.nonce.as_slice().try_into()?;
    let signature = key.sign(&join_message(session, purpose, 0, 0, &binding)).to_vec();
    let join = Join { session: session.0.to_vec(), purpose: purpose as i32, leg: 0, link: 0, signature };
    write(&mut writer, Body::Join(join)).await?;
    let Frame::Message(body, _) = read(&mut reader).await? else { anyhow::bail!("no answer") };
    Ok(body)
}

/// A migration `m1` that goes on until it is cancelled, and its session's id; `None` where tests are skipped.
fn under_way(test: &str, config: AgentConfig, arguments: &[&str]) -> Result<Option<(SimScene, SessionId)>> {
    if !SimScene::possible(test) {
        return Ok(None);
    }
    let scene = SimScene::with(SimGuest::default(), config.clone(), config)?;
    scene.incoming()?;
    let slow = ["--bandwidth-limit", "1600kbit"];
    scene.begin("m1", &[arguments, &slow].concat())?.success()?;
    let session = until("the session", std::time::Duration::from_secs(20), || journaled_session(&scene.b))?;
    Ok(Some((scene, session)))
}

/// The session in the journal of `m1` at its destination, once it is there.
fn journaled_session(agent: &Agent) -> Result<Option<SessionId>> {
    let path = agent.state_dir().join("journal/m1.destination.jsonl");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let Some((_, rest)) = text.split_once("\"session\":\"") else { return Ok(None) };
    let digits = rest.get(..64).context("64 digits")?;
    let mut id = [0; 32];
    for (byte, digits) in id.iter_mut().zip(digits.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits)?, 16)?;
    }
    Ok(Some(SessionId(id)))
}

/// An attack with a migration to try it on.
struct Case<'a> {
    attack: Attack,
    path: &'a [&'a str],
}

impl Case<'_> {
    fn new(attack: Attack) -> Self {
        Case { attack, path: &THROUGH }
    }

    /// Migrates through the man in the middle; `None` where tests are skipped.
    fn play(self, test: &str) -> Result<Option<SimScene>> {
        let Some((scene, _, said)) = self.run(test)? else { return Ok(None) };
        said.success()?;
        Ok(Some(scene))
    }

    fn run(self, test: &str) -> Result<Option<(SimScene, Middle, dwcp_tests::CtlOutput)>> {
        if !SimScene::possible(test) {
            return Ok(None);
        }
        let mut scene = SimScene::new()?;
        let middle = Middle::start(&scene.a, &scene.b, self.attack)?;
        scene.via = Some(middle.target());
        scene.incoming()?;
        let said = scene.migrate(self.path)?;
        Ok(Some((scene, middle, said)))
    }

    /// The attack ends the migration, with the guest at the source.
    fn refused(self, test: &str, code: &str, at_source: &Counts, at_destination: &Counts) -> Result<()> {
        let Some((mut scene, middle, said)) = self.run(test)? else { return Ok(()) };
        said.refused_as(code).with_context(|| scene.logs())?;
        stayed(&mut scene, &middle, at_source, at_destination)
    }

    /// The attack comes to nothing.
    fn moved(self, test: &str, at_destination: &Counts) -> Result<()> {
        self.moved_with(test, &[], at_destination)
    }

    fn moved_with(self, test: &str, at_source: &Counts, at_destination: &Counts) -> Result<()> {
        let Some((scene, _middle, said)) = self.run(test)? else { return Ok(()) };
        said.success().with_context(|| scene.logs())?;
        ensure!(scene.ending_of_guests()? == Ending::Moved);
        counted(&scene, at_source, at_destination)
    }
}

type Counts = [(&'static str, u64)];

/// The guest runs on where it was, nothing forged arrived, what was tried is counted, and the next migration succeeds.
fn stayed(scene: &mut SimScene, middle: &Middle, at_source: &Counts, at_destination: &Counts) -> Result<()> {
    ensure!(scene.ending_of_guests()? == Ending::Stayed);
    // Either nothing arrived, or the very guest that left, which stands still.
    if scene.to.state().is_ok_and(|state| state.guest.is_some()) {
        scene.same_guest()?;
    }
    middle.nothing_barred_was_applied()?;
    counted(scene, at_source, at_destination)?;
    scene.again()
}

fn counted(scene: &SimScene, at_source: &Counts, at_destination: &Counts) -> Result<()> {
    for (agent, expected) in [(&scene.a, at_source), (&scene.b, at_destination)] {
        let expected: BTreeMap<String, u64> =
            expected.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect();
        let found = attempts(agent)?;
        ensure!(found == expected, "{} counted {found:?}, not {expected:?}\n{}", agent.node(), scene.logs());
    }
    Ok(())
}

/// Does this to chunk [`AT`] each time that it comes, which must not be applied.
fn at(mut act: impl FnMut(Chunk, &mut Pen) -> Vec<Sealed> + Send + 'static) -> Attack {
    Attack::chunks(move |chunk, pen| match chunk.header.seq {
        AT => {
            pen.bar(&chunk);
            act(chunk, pen)
        }
        _ => vec![pen.seal(chunk)],
    })
}

/// The end of the stream, right before `chunk`.
fn end(chunk: &Chunk, pen: &mut Pen) -> Sealed {
    let mut end = chunk.clone().with_payload(Vec::new());
    end.header.kind = Kind::End;
    end.header.codec = Codec::Raw;
    end.header.version = PageVersion(0);
    (end.header.stream_len, end.header.raw_len) = (0, 0);
    end.header.offset = StreamOffset(chunk.header.offset.0);
    pen.seal(end)
}

/// A zstd frame (RFC 8878) that announces a gigabyte and holds it: blocks of one byte repeated 128 KiB times.
fn gigabyte() -> Vec<u8> {
    const BLOCK: u32 = 128 << 10;
    // Magic; a single segment with a content size of four bytes.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    frame.extend_from_slice(&(1_u32 << 30).to_le_bytes());
    let blocks = (1 << 30) / BLOCK;
    for block in 1..=blocks {
        let header = BLOCK << 3 | 1 << 1 | u32::from(block == blocks);
        frame.extend_from_slice(&header.to_le_bytes()[..3]);
        frame.push(0);
    }
    frame
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}
