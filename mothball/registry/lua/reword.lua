-- include: common
-- include: job
-- Other arguments for a job that runs: the same, with secrets replaced that only the run itself could know to be secrets.
--
-- ARGV  1 job   2 fence   3 arguments, JSON
-- Returns {'ok'} | {'lost'}. Safe to repeat.
local job, fence = arg(1), arg(2)
if run_of(job, fence) ~= 'run' then
  return {'lost'}
end
redis.call('HSET', key('job', job), 'args', arg(3))
return {'ok'}
