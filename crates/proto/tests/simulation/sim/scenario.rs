//! What one run is like: drawn from its seed, so that a million seeds are a million different worlds.

use std::time::Duration;

use dwcp_proto::handover::Afterwards;
use dwcp_proto::limits::{MAX_RAW_PAYLOAD, MAX_SEGMENT_BYTES, MAX_WIRE_PAYLOAD};
use dwcp_proto::message::{Choice, Offer};
use dwcp_proto::negotiate::{self, MAX_STREAMS, MIN_WINDOW, Mode, Path, Wish};

use super::queue::{MS, SECOND, Time};
use super::rng::Rng;

/// Rules broken on purpose, at the border between the machines and their drivers. The simulation must find each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// The sender is not told of a lost connection.
    LinkDownUntold,
    /// A new control connection does not begin with the newest acknowledgement.
    AckNotRepeated,
    /// The source does not listen to refusals.
    RefusalIgnored,
    /// A refusal is said once, and lost with its connection.
    RefusalSaidOnce,
    /// The destination drops the second copy of a chunk whose first is still on its way.
    SecondCopyDropped,
    /// A copy that broke off stays admitted.
    BrokenCopyKept,
    /// What was applied before is applied again.
    DuplicateApplied,
    /// A payload is not held against its digest.
    DigestUnchecked,
    /// Chunks are applied as they come.
    OrderIgnored,
    /// The source makes chunks without asking for room.
    RoomIgnored,
    /// An acknowledgement says what has arrived, not what was applied.
    AckBeforeApplied,
    /// The commit is sent while it is being written.
    CommitBeforeJournal,
    /// The destination's VMM is not stopped while incoming.
    NoStopWhileIncoming,
    /// The handover is not told of a new connection.
    NoResend,
    /// The source goes on after what it has handed out, not from where the destination stopped.
    ReelNotRewound,
    /// The destination says that it stopped elsewhere than it did.
    TurnsBehind,
    /// The order to change the path is said once.
    SwitchSaidOnce,
    /// One that comes before the destination's data path has begun is dropped.
    EarlyOrderLost,
    /// It is answered once.
    SwitchedSaidOnce,
    /// Where a v1 stream ends is said once.
    StreamEndSaidOnce,
    /// A v1 connection goes on where the last one was, not where the destination is.
    BytesNotRepeated,
    /// The flag is read and not obeyed.
    FlagIgnored,
}

/// A clock of a node: monotonic time for deadlines and the pace, wall time for people.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    /// Parts in a million that it is too fast.
    drift: i64,
    /// What it showed when the world began.
    monotonic: Time,
    pub(crate) wall_ms: u64,
}

impl Clock {
    fn draw(rng: &mut Rng) -> Self {
        let drift = match rng.below(4) {
            0 => 0,
            1 => rng.between(0, 100_000) as i64 - 50_000,
            _ => rng.between(0, 400) as i64 - 200,
        };
        let ten_years = 10 * 365 * 86_400;
        let wall_ms = 1_764_547_200_000 + rng.below(ten_years) * 1000;
        Clock { drift, monotonic: rng.below(ten_years) * SECOND, wall_ms }
    }

    /// What it shows when the world's time is `now`.
    pub(crate) fn reads(&self, now: Time) -> Duration {
        let drifted = i128::from(now) * i128::from(1_000_000 + self.drift) / 1_000_000;
        Duration::from_nanos(self.monotonic + drifted as u64)
    }

    /// How much of the world's time `span` on this clock is.
    pub(crate) fn lasts(&self, span: Time) -> Time {
        (i128::from(span) * 1_000_000 / i128::from(1_000_000 + self.drift)) as Time
    }
}

/// How often each fault is drawn, against the others.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Weights {
    pub(crate) reset: u64,
    pub(crate) reset_control: u64,
    pub(crate) reset_all: u64,
    pub(crate) black_hole: u64,
    pub(crate) cut: u64,
    pub(crate) stall: u64,
    pub(crate) slow_sink: u64,
    pub(crate) idle_guest: u64,
    pub(crate) crash: [u64; 2],
    pub(crate) vmm_death: [u64; 2],
    pub(crate) refusal: [u64; 2],
    pub(crate) bad_disk: [u64; 2],
    pub(crate) clock_jump: u64,
    pub(crate) cancel: [u64; 2],
    pub(crate) flag: u64,
    pub(crate) veto: u64,
    pub(crate) trouble: u64,
    pub(crate) operator: u64,
}

#[derive(Debug, Clone)]
pub(crate) struct Scenario {
    pub(crate) choice: Choice,
    /// What the source and the destination offered, and what was wished for.
    pub(crate) offers: [Offer; 2],
    pub(crate) wish: Wish,
    /// How long v3 must have been allowed before it is entered again.
    pub(crate) hesitation: Duration,
    pub(crate) guest_ran: bool,
    pub(crate) on_abort: Afterwards,
    pub(crate) on_success: Afterwards,
    /// How much of the downtime the pace may use.
    pub(crate) budget: Duration,
    /// Data chunks of the whole stream.
    pub(crate) chunks: u64,
    pub(crate) rounds: u64,
    /// Bytes of the VMM's stream in a chunk, least and most.
    pub(crate) sizes: [u64; 2],
    /// The part of it that is left after compression, in 1/256.
    pub(crate) ratio: u64,
    /// One way, and what comes on top at most.
    pub(crate) latency: Time,
    pub(crate) jitter: Time,
    /// Picoseconds a byte, for one connection.
    pub(crate) ps_per_byte: u64,
    /// Picoseconds for the destination's VMM to take a byte.
    pub(crate) sink_ps: u64,
    /// Time to encode a chunk, and to verify one at most.
    pub(crate) encode: Time,
    pub(crate) verify: Time,
    /// Chance of a copy to be altered on its way, in parts a million.
    pub(crate) altered: u64,
    pub(crate) clocks: [Clock; 2],
    /// How long each side waits for a control connection.
    pub(crate) patience: [Time; 2],
    pub(crate) deadline: Option<Time>,
    /// Faults come until then; from there on the world is fair.
    pub(crate) faults_until: Time,
    pub(crate) fault_gap: Time,
    pub(crate) weights: Weights,
    pub(crate) mutant: Option<Mutant>,
}

impl Scenario {
    /// The scenario of a seed. An error is a broken rule of the negotiation.
    pub(crate) fn draw(rng: &mut Rng) -> Result<Self, String> {
        let (choice, offers, wish) = negotiated(rng)?;
        let small = rng.one_in(6);
        let top = if small { rng.between(20, 2000) } else { rng.scale(2000, MAX_SEGMENT_BYTES as u64) };
        let chunks = if small { rng.scale(500, 12_000) } else { rng.scale(1, 1500) };
        let faults = !rng.one_in(10);
        let mut weights = Weights {
            reset: 12,
            reset_control: 8,
            reset_all: 2,
            black_hole: 6,
            cut: 3,
            stall: 6,
            slow_sink: 4,
            idle_guest: 4,
            clock_jump: 1,
            ..Weights::default()
        };
        if rng.one_in(2) {
            (weights.flag, weights.veto, weights.trouble, weights.operator) = (40, 16, 4, 20);
        }
        let latency = rng.scale(MS / 50, 150 * MS);
        let mut scenario = Scenario {
            choice,
            offers,
            wish,
            hesitation: Duration::from_nanos(rng.scale(100 * MS, 20 * SECOND)),
            guest_ran: !rng.one_in(8),
            on_abort: if rng.one_in(3) { Afterwards::Quit } else { Afterwards::Leave },
            on_success: if rng.one_in(2) { Afterwards::Quit } else { Afterwards::Leave },
            budget: Duration::from_nanos(rng.scale(5 * MS, SECOND)),
            chunks,
            rounds: rng.scale(1, 30),
            sizes: [(top / rng.between(1, 20)).max(1), top],
            ratio: rng.between(4, 256),
            latency,
            jitter: rng.below(latency + 1),
            // From 10 Gbit/s down to 8 Mbit/s.
            ps_per_byte: rng.scale(800, 1_000_000),
            sink_ps: rng.scale(100, 20_000),
            encode: rng.scale(MS / 100, 3 * MS),
            verify: rng.scale(MS / 100, 5 * MS),
            altered: if rng.one_in(3) { rng.scale(100, 60_000) } else { 0 },
            clocks: [Clock::draw(rng), Clock::draw(rng)],
            patience: [rng.between(60, 1800) * SECOND, rng.between(60, 1800) * SECOND],
            deadline: None,
            faults_until: 0,
            fault_gap: 0,
            weights,
            mutant: None,
        };
        // Often the link is what is slow: then copies are half-read for longer.
        if rng.one_in(3) {
            (scenario.encode, scenario.verify, scenario.sink_ps) = (MS / 100, MS / 100, 100);
        }
        if faults {
            let work = scenario.work();
            scenario.faults_until = rng.scale(work / 2 + 10 * MS, 3 * work + 10 * SECOND);
            scenario.fault_gap = rng.scale(20 * MS, scenario.faults_until.max(40 * MS));
        }
        // Half of the worlds may hold what a migration need not survive.
        if faults && rng.one_in(2) {
            scenario.add_deadly(rng);
        }
        Ok(scenario)
    }

    fn add_deadly(&mut self, rng: &mut Rng) {
        let mut some = |n: u64| if rng.one_in(2) { rng.between(1, n) } else { 0 };
        self.weights.crash = [some(5), some(5)];
        self.weights.vmm_death = [some(1), some(1)];
        self.weights.refusal = [some(3), some(3)];
        self.weights.bad_disk = [some(4), some(4)];
        self.weights.cancel = [some(1), some(1)];
        if rng.one_in(4) {
            let side = rng.below(2) as usize;
            self.patience[side] = rng.scale(SECOND, 30 * SECOND);
        }
        if rng.one_in(4) {
            self.deadline = Some(rng.scale(100 * MS, 2 * self.work() + 10 * SECOND));
        }
    }

    /// Faults off, for a migration that must succeed.
    pub(crate) fn fair(mut self) -> Self {
        self.faults_until = 0;
        self.deadline = None;
        self.altered = 0;
        self
    }

    /// About how long everything takes if nothing overlaps.
    pub(crate) fn work(&self) -> Time {
        let bytes = self.chunks * self.sizes[1];
        let wire = bytes * self.ratio / 256 + self.chunks * 200;
        let each = self.encode + self.verify + MS / 10;
        wire * self.ps_per_byte / 1000 + bytes * self.sink_ps / 1000 + self.chunks * each
    }

    /// By when a fair world must have ended, faults being over: a wide margin over work and round trips, one of them a
    /// chunk for the worst pace, and the time that ends take to notice dead connections.
    pub(crate) fn bound(&self) -> Time {
        let trip = 2 * (self.latency + self.jitter);
        // v1 does not compress.
        let work =
            Scenario { ratio: self.ratio.max(if self.turns() { 256 } else { 0 }), ..self.clone() }.work();
        4 * work + self.chunks * 2 * trip + 300 * SECOND
    }

    /// Whether the path may change.
    pub(crate) fn turns(&self) -> bool {
        let w = &self.weights;
        w.flag + w.veto + w.trouble + w.operator > 0
    }

    /// What the next chunk of the stream is: bytes of the stream, before compression, on the wire.
    pub(crate) fn lengths(&self, rng: &mut Rng) -> [u32; 3] {
        let stream = rng.between(self.sizes[0], self.sizes[1]).min(MAX_SEGMENT_BYTES as u64);
        let raw = (stream + rng.below(stream / 16 + 8)).min(MAX_RAW_PAYLOAD as u64);
        let wire = (raw * self.ratio / 256).clamp(1, MAX_WIRE_PAYLOAD as u64);
        [stream, raw, wire].map(|n| n as u32)
    }
}

/// Draws offers until v3 comes of them, and holds each choice against what the offers say.
fn negotiated(rng: &mut Rng) -> Result<(Choice, [Offer; 2], Wish), String> {
    loop {
        let (source, destination) = (offer(rng), offer(rng));
        let wish = Wish {
            path: rng.pick(&[None, None, Some(Path::V1), Some(Path::V3)]).flatten(),
            mode: rng.pick(&[None, Some(Mode::Internet), Some(Mode::Datacenter)]).flatten(),
            streams: rng.one_in(3).then(|| rng.between(0, 20) as u32),
            // What the connections are made of is nothing to these machines.
            quic: false,
        };
        let link = if rng.one_in(2) { Mode::Internet } else { Mode::Datacenter };
        let v3 = source.v3 && destination.v3;
        let barred = |o: &Offer| o.v1 == 0 || o.v1 == 1 && link == Mode::Internet;
        let v1 = !barred(&source) && !barred(&destination);
        let expected = match wish.path {
            Some(Path::V3) | None if v3 => Some(Path::V3),
            Some(Path::V1) | None if v1 => Some(Path::V1),
            _ => None,
        };
        let case = || format!("{source:?} {destination:?} {wish:?} {link:?}");
        match negotiate::choose(&source, &destination, wish, link) {
            Err(_) if expected.is_none() => {}
            Err(why) => return Err(format!("{why}, but {expected:?} was possible: {}", case())),
            Ok(choice) => {
                negotiate::permits(&choice, &source, &destination)
                    .map_err(|why| format!("the destination refuses its own choice, {why}: {}", case()))?;
                let path = Path::from_wire(choice.path);
                if path != expected {
                    return Err(format!("{path:?} instead of {expected:?}: {}", case()));
                }
                if path == Some(Path::V1) && wish.path.is_none() && choice.reasons.is_empty() {
                    return Err(format!("v1 without a reason: {}", case()));
                }
                if choice.plain && (link == Mode::Internet || !source.v3_plain && !source.v1_plain) {
                    return Err(format!("plain where it must not be: {}", case()));
                }
                if path == Some(Path::V3) {
                    return Ok((choice, [source, destination], wish));
                }
            }
        }
    }
}

fn offer(rng: &mut Rng) -> Offer {
    let window = if rng.one_in(4) { MIN_WINDOW } else { rng.scale(MIN_WINDOW, 64 << 20) };
    Offer {
        minor_min: 0,
        minor_max: rng.below(2) as u32,
        v1: rng.below(3) as u32,
        v1_plain: rng.one_in(2),
        v3: !rng.one_in(4),
        v3_reason: "drawn".into(),
        v3_plain: rng.one_in(2),
        codecs: 0b111,
        hde: 1,
        streams: rng.between(1, u64::from(MAX_STREAMS)) as u32,
        window,
        ..Offer::default()
    }
}
