-- include: common
-- include: job
-- include: crash
-- Keep the evidence of a crash report before anything else is done for it: a later run of the job uses the first run's.
--
-- ARGV  1 job   2 fence   3 evidence (any text)   4 ms it is kept
-- Returns {'ok', evidence, ms at which it was taken, id of the job's report or ''} | {'lost'}
local job, fence = arg(1), arg(2)
if run_of(job, fence) ~= 'run' then
  return {'lost'}
end
local draft = key('crash', 'draft', job)
if redis.call('EXISTS', draft) == 0 then
  redis.call('HSET', draft, 'evidence', arg(3), 'at', int(NOW))
end
redis.call('PEXPIRE', draft, arg(4))
local v = redis.call('HMGET', draft, 'evidence', 'at', 'report')
return {'ok', v[1] or '', v[2], v[3] or ''}
